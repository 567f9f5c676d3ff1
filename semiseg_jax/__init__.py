"""Semi-supervised semantic segmentation with strong data augmentation, in JAX."""

import os

# Before TensorFlow is imported. It only feeds us: its start-up notes would bury our own lines,
# and oneDNN's kernels round differently from machine to machine, so that augmented images would.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
