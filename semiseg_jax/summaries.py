"""What TensorBoard shows of a stage, written so that a full disk is one sentence."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import tensorflow as tf
from clu import metric_writers
from etils import epath

from semiseg_jax import distributed
from semiseg_jax.errors import unwritten


@contextlib.contextmanager
def writing(folder: epath.PathLike) -> Iterator[None]:
    """What TensorFlow, or JAX's profiler, meets as it writes into a folder, as of any other file.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        yield
    except (OSError, tf.errors.OpError, jax.errors.JaxRuntimeError) as error:
        raise unwritten(folder, error) from error


class Writer(metric_writers.MultiWriter):
    """TensorBoard's file of a stage, and lines in the log; in processes but the first the latter.

    Raises a UserError where the disk is full, whichever call meets that first: events are kept
    until they are flushed.
    """

    def __init__(self, folder: epath.PathLike):
        self._folder = folder
        with writing(folder):
            made = metric_writers.create_default_writer(
                folder, just_logging=not distributed.is_main(), asynchronous=False
            )
        super().__init__([made])

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes numbers by name."""
        with writing(self._folder):
            super().write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images by name."""
        with writing(self._folder):
            super().write_images(step, images)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes histograms of arrays by name."""
        with writing(self._folder):
            super().write_histograms(step, arrays, num_buckets)

    def flush(self) -> None:
        """Has the file hold all that was written."""
        with writing(self._folder):
            super().flush()

    def close(self) -> None:
        """As `flush`, for the last time."""
        with writing(self._folder):
            super().close()
