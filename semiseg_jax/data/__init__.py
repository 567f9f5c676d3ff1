"""Data: sources, splits, labels, augmentation, and the pipeline that joins them."""

import os
import sys


def _import_tensorflow_without_its_greeting() -> None:
    """TensorFlow's C++ prints notes on import that no setting turns off; they bury our lines.

    What goes wrong on import comes as a Python exception, and so is seen all the same.
    """
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


_import_tensorflow_without_its_greeting()
