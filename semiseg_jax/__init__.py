"""Semi-supervised semantic segmentation with strong data augmentation, in JAX."""

import os
import sys

if sys.argv[:1] == ["-m"]:
    # Python has this name for the program while it locates a module to run, as in `python -m
    # semiseg_jax.main`: a command starts, and Ctrl-C is to end it without a traceback.
    from semiseg_jax.runtime import interrupts

    interrupts.exit_on_interrupt()

# Set before TensorFlow is imported: its start-up messages would bury the lines of this program.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = "0.1.0"
