"""Writes the metrics of a stage: TensorBoard events and metrics.jsonl.

An event file holds steps that a restart repeated twice, and only TensorBoard reads it. In
metrics.jsonl each step occurs once: a restart drops the lines after its checkpoint.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from clu import metric_writers
from etils import epath

from semiseg_jax.runtime import fileio, json_forms, multihost
from semiseg_jax.runtime.errors import read_error, write_error
from semiseg_jax.runtime.fileio import parse_json, read_text, write_bytes
from semiseg_jax.runtime.quiet_tensorflow import tf

METRICS_FILE = "metrics.jsonl"


def _is_metric(value: Any) -> bool:
    """Whether a value is a number; a metric of no pixels may be NaN."""
    return isinstance(value, float)


# The windows of the newest checkpoints (see `MetricWindow`), by step.
WINDOWS_FILE = "metrics_since_last_line.json"
# There are two checkpoints, and the one that is being written.
_KEPT_WINDOWS = 3
_WINDOWS = json_forms.mapping_of(
    json_forms.both(
        json_forms.record(
            {
                "values": json_forms.list_of(json_forms.mapping_of(_is_metric)),
                "seconds": json_forms.is_number,
                "input_wait": json_forms.is_number,
            }
        ),
        # Every step has the same metrics, and the window no further keys.
        lambda window: len(window) == 3 and len({tuple(v) for v in window["values"]}) == 1,
    ),
    lambda step: step.isdecimal() and step.isascii() and len(step) < 19,
)
# A line of metrics.jsonl.
_LINE = json_forms.both(
    json_forms.record({"step": json_forms.is_count}), json_forms.mapping_of(json_forms.is_number)
)
# Scalars of metrics.jsonl that TensorBoard does not show.
_JSON_ONLY = frozenset({"seconds"})


@contextlib.contextmanager
def raise_write_errors(folder: epath.PathLike) -> Iterator[None]:
    """Converts write errors of TensorFlow and of JAX's profiler into a UserError.

    Args:
        folder: the folder that they write to.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        yield
    except (OSError, tf.errors.OpError, jax.errors.JaxRuntimeError) as error:
        raise write_error(folder, error) from error


class MetricWriter(metric_writers.MultiWriter):
    """Writes to TensorBoard, to the log and, during training, to metrics.jsonl.

    Only process 0 writes files; the other processes write to the log.

    Attributes:
        tensorboard: writes to TensorBoard and the log only.
    """

    def __init__(self, folder: epath.PathLike, resume_step: int | None = None):
        """Opens the files of a stage.

        Args:
            folder: folder of the stage.
            resume_step: step that training resumes from, 0 at its beginning; later lines of
                metrics.jsonl are dropped. None leaves metrics.jsonl unchanged, as evaluations do:
                their scores are in results.json.

        Raises:
            UserError: the disk is full or not writable, or metrics.jsonl is not readable.
        """
        self.tensorboard = TensorBoardWriter(folder)
        writers: list[metric_writers.MetricWriter] = [self.tensorboard]
        if resume_step is not None:
            writers.append(JsonLinesWriter(folder, resume_step))
        super().__init__(writers)


class TensorBoardWriter(metric_writers.MultiWriter):
    """Writes TensorBoard events and lines in the log.

    Every method raises a UserError if the disk is full: TensorFlow buffers events, so any call may
    be the one that fails.
    """

    def __init__(self, folder: epath.PathLike):
        self._folder = folder
        with raise_write_errors(folder):
            writer = metric_writers.create_default_writer(
                folder, just_logging=not multihost.is_main(), asynchronous=False
            )
        super().__init__([writer])

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes scalars by name."""
        shown = {name: value for name, value in scalars.items() if name not in _JSON_ONLY}
        with raise_write_errors(self._folder):
            super().write_scalars(step, shown)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images by name."""
        with raise_write_errors(self._folder):
            super().write_images(step, images)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes histograms of arrays by name."""
        # NumPy refuses to divide the range of a few float32 roundings into buckets: the scales of a
        # norm after few steps.
        wide = {name: np.asarray(values, np.float64) for name, values in arrays.items()}
        with raise_write_errors(self._folder):
            super().write_histograms(step, wide, num_buckets)

    def flush(self) -> None:
        """Writes buffered events to the file."""
        with raise_write_errors(self._folder):
            super().flush()

    def close(self) -> None:
        """Writes buffered events and closes the file."""
        with raise_write_errors(self._folder):
            super().close()


class JsonLinesWriter(metric_writers.MetricWriter):
    """Writes scalars to metrics.jsonl, a line {"step": …, name: value, …} per call.

    A flush writes the whole file again, atomically. Values that are not finite are omitted, because
    JSON cannot represent them. Everything but scalars is ignored.
    """

    def __init__(self, folder: epath.PathLike, resume_step: int):
        """Reads the existing lines up to `resume_step`.

        Raises:
            UserError: metrics.jsonl is not readable.
        """
        folder = epath.Path(folder)
        self._path = folder / METRICS_FILE
        self._lines = [line for line in read_metrics(folder) if line["step"] <= resume_step]
        self._is_flushed = True

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds a line; `flush` writes it."""
        values = {name: float(value) for name, value in scalars.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._lines.append({"step": step, **finite})
        self._is_flushed = False

    def flush(self) -> None:
        """Writes the file if it has new lines.

        Raises:
            UserError: the disk is full or not writable.
        """
        if self._is_flushed:
            return
        if multihost.is_main():
            content = "".join(json.dumps(line) + "\n" for line in self._lines)
            # No fsync: training does not wait for the disk, and a damaged file reads as empty.
            write_bytes(self._path, content.encode(), sync=False)
        self._is_flushed = True

    def close(self) -> None:
        """Writes the file if it has new lines."""
        self.flush()

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Ignores raw summaries."""

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Ignores images."""

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Ignores videos."""

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Ignores audio."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Ignores texts."""

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Ignores histograms."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Ignores hyperparameters."""


def read_metrics(folder: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of a stage's metrics.jsonl; [] if it is missing or of another form.

    Raises:
        UserError: the file is not readable.
    """
    path = folder / METRICS_FILE
    try:
        text = read_text(path) if path.exists() else ""
        lines = [parse_json(line) for line in text.splitlines()]
    except OSError as error:
        raise read_error(path, error, "make it readable") from error
    except ValueError:
        return []
    return lines if all(map(_LINE, lines)) else []


@dataclasses.dataclass
class MetricWindow:
    """What was measured since the last line of metrics.jsonl.

    Attributes:
        values: the metrics of each step, by name.
        seconds: time that these steps took.
        input_wait: the part of it, in seconds, in which the devices waited for input.
    """

    values: list[dict[str, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    input_wait: float = 0.0


def write_window(folder: epath.Path, step: int, window: MetricWindow) -> None:
    """Stores the window that belongs to a checkpoint, so that a restart writes the same lines.

    Keeps the windows of the newest checkpoints; a restart may go back to an earlier one.

    Args:
        folder: folder of the stage.
        step: of the checkpoint.
        window: what was measured up to there; nothing is stored for an empty one.

    Raises:
        UserError: the disk is full or not writable.
    """
    earlier = _read_windows(folder)
    windows = {k: v for k, v in earlier.items() if int(k) < step}
    windows = dict(sorted(windows.items(), key=lambda item: int(item[0]))[-_KEPT_WINDOWS:])
    if window.values:
        windows[str(step)] = dataclasses.asdict(window)
    if windows != earlier and multihost.is_main():
        write_bytes(folder / WINDOWS_FILE, (json.dumps(windows) + "\n").encode())


def read_window(folder: epath.Path, step: int) -> MetricWindow:
    """Returns the window that `write_window` stored at a step; an empty one if there is none."""
    return MetricWindow(**_read_windows(folder).get(str(step), {}))


def _read_windows(folder: epath.Path) -> dict[str, Any]:
    return fileio.read_json(folder / WINDOWS_FILE, _WINDOWS) or {}


def copy_metrics(source: epath.Path, folder: epath.Path) -> None:
    """Copies the metrics.jsonl of another stage, if it has one."""
    if multihost.is_main() and (source / METRICS_FILE).exists():
        write_bytes(folder / METRICS_FILE, (source / METRICS_FILE).read_bytes())
