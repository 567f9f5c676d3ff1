"""Semi-supervised semantic segmentation with strong data augmentation, in JAX."""

import os

# Set before TensorFlow is imported: its start-up messages would bury the lines of this program.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = "0.1.0"
