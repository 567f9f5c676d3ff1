"""TensorFlow, imported without the notes that its C++ code prints on import.

No setting turns these notes off, and they bury the lines of this program. Errors on import are
Python exceptions and still reach the user. Every module that needs TensorFlow imports `tf` from
here; numerics (`losses`, `models`, `mesh`, `train_step`, `inference`) do not need it.
"""

import os
import sys


def _import_quietly() -> None:
    """Imports TensorFlow while file descriptor 2 is redirected to the null device."""
    if "tensorflow" in sys.modules:
        return
    # Keras imports Matplotlib, which $MPLBACKEND may prevent.
    from semiseg_jax.runtime import plain_matplotlib  # noqa: F401

    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


_import_quietly()

import tensorflow as tf  # noqa: E402

__all__ = ["tf"]
