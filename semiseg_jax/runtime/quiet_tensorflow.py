"""TensorFlow, imported without the notes that its C++ code prints on import.

No setting turns these notes off, and they bury the lines of this program. Errors on import are
Python exceptions and still reach the user. Every module that needs TensorFlow imports `tf` from
here; numerics (`losses`, `models`, `mesh`, `train_step`, `inference`) do not need it.
"""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _without_keras() -> Iterator[None]:
    """Lets TensorFlow load Keras at its first use, of which this program has none.

    TensorFlow imports Keras eagerly, and Keras Matplotlib and scikit-learn: a third of the time of
    TensorFlow's import. With this variable it looks for Keras 2 instead, which is seldom installed,
    and goes on without it; `tf.keras` reads the variable again when it is used.
    """
    name = "TF_USE_LEGACY_KERAS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _import_quietly() -> None:
    """Imports TensorFlow without Keras, while file descriptor 2 is the null device."""
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        with _without_keras():
            import tensorflow  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


_import_quietly()

import tensorflow as tf  # noqa: E402

__all__ = ["tf"]
