"""Semi-supervised semantic segmentation with strong data augmentation, in JAX."""

import os

# Before TensorFlow is imported: it only feeds us, and its start-up notes would bury our own lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = "0.1.0"
