"""The metric writer: files and their content, a resumed stage, and full disks."""

import dataclasses
import json
import math
import random
import re
import shutil
import types
from unittest import mock

import jax
import numpy as np
import pytest
import tensorflow as tf
from clu import metric_writers
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from semiseg_jax import compiled_model, stages, train
from semiseg_jax.data import input_pipeline
from semiseg_jax.runtime import metric_writer
from tests import json_mutants, workdirs
from tests.conftest import tiny_config
from tests.errors import raises_code

FULL = ("stage", "No space left on device")


def fill(disk):
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))


def scalar_tags(folder):
    events = EventAccumulator(str(folder), {"tensors": 0})
    events.Reload()
    return set(events.Tags()["tensors"])


def test_scalars_are_written_to_both_files_and_seconds_to_json_only(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, resume_step=0)
    writer.write_scalars(2, {"loss": np.float32(0.5), "seconds": 1.25})
    writer.tensorboard.write_scalars(2, {"uptime": 3.0})
    writer.write_images(2, {"image": np.zeros((1, 2, 2, 3), np.uint8)})
    writer.flush()
    writer.write_scalars(4, {"loss": float("nan"), "seconds": 2.0})
    writer.close()
    text = '{"step": 2, "loss": 0.5, "seconds": 1.25}\n{"step": 4, "seconds": 2.0}\n'
    assert (tmp_path / metric_writer.METRICS_FILE).read_text() == text
    assert scalar_tags(tmp_path) == {"loss", "uptime", "image"}


def test_metrics_of_an_evaluation_are_not_json_lines(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path)
    writer.write_scalars(2, {"miou": 0.5})
    writer.close()
    assert not (tmp_path / metric_writer.METRICS_FILE).exists()
    assert scalar_tags(tmp_path) == {"miou"}


def test_json_lines_behind_the_resumed_step_are_dropped_with_the_next_line(tmp_path):
    folder = epath.Path(tmp_path)
    writer = metric_writer.JsonLinesWriter(folder, 0)
    for step in (2, 4, 6):
        writer.write_scalars(step, {"loss": step})
        writer.flush()
    resumed = metric_writer.JsonLinesWriter(folder, 4)
    resumed.close()
    assert [line["step"] for line in metric_writer.read_metrics(folder)] == [2, 4, 6]
    resumed.write_scalars(6, {"loss": 60})
    resumed.flush()
    lines = [(line["step"], line["loss"]) for line in metric_writer.read_metrics(folder)]
    assert lines == [(2, 2), (4, 4), (6, 60)]


def test_only_process_0_writes_files(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_writer.multihost, "is_main", lambda: False)
    writer = metric_writer.MetricWriter(tmp_path, resume_step=0)
    writer.write_scalars(2, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_damaged_json_lines_read_as_empty(tmp_path):
    (tmp_path / metric_writer.METRICS_FILE).write_text(json.dumps({"step": 2}) + '\n{"step"')
    assert metric_writer.read_metrics(epath.Path(tmp_path)) == []


def test_a_full_disk_raises_a_user_error_at_the_start(small_disk):
    fill(small_disk)
    with raises_code("path-unwritable", *FULL):
        metric_writer.MetricWriter(small_disk / "stage")


@pytest.mark.parametrize("resume_step", [None, 0])
@pytest.mark.parametrize(
    "write",
    [
        lambda writer, step: (writer.write_scalars(step, {"loss": 1.0}), writer.flush()),
        # Without a flush: TensorFlow flushes from time to time.
        lambda writer, step: writer.write_scalars(step, {"loss": 1.0}),
        lambda writer, step: writer.write_histograms(step, {"norm": np.arange(9.0)}),
    ],
)
def test_a_full_disk_raises_a_user_error_later(small_disk, write, resume_step):
    writer = metric_writer.MetricWriter(small_disk / "stage", resume_step)
    fill(small_disk)
    with raises_code("path-unwritable", *FULL):
        for step in range(1000):
            write(writer, step)


def test_a_histogram_of_values_that_differ_by_rounding_is_written(tmp_path):
    one = np.float32(1)
    values = np.array([one, np.nextafter(one, np.float32(2)), one])
    metric_writer.MetricWriter(tmp_path / "stage").write_histograms(1, {"scale": values})


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("write_scalars", (1, {})),
        ("write_images", (1, {})),
        ("write_histograms", (1, {})),
        ("flush", ()),
        ("close", ()),
    ],
)
def test_every_call_converts_a_write_error(tmp_path, monkeypatch, call, arguments):
    def full(*_):
        raise tf.errors.ResourceExhaustedError(
            None, None, "{{function_node __wrapped__}} events; No space left on device\n\tFailed"
        )

    monkeypatch.setattr(metric_writers.SummaryWriter, call, full)
    with raises_code("path-unwritable", *FULL):
        getattr(metric_writer.MetricWriter(tmp_path / "stage"), call)(*arguments)


def test_a_full_disk_raises_a_user_error_for_a_profile(small_disk):
    jax.profiler.start_trace(str(small_disk / "stage"))
    fill(small_disk)
    with (
        raises_code("path-unwritable", *FULL),
        metric_writer.raise_write_errors(small_disk / "stage"),
    ):
        jax.profiler.stop_trace()


def test_a_file_with_the_name_of_the_folder_raises_a_user_error(tmp_path):
    (tmp_path / "stage").write_text("")
    with raises_code("path-unwritable", "stage", "Not a directory"):
        metric_writer.MetricWriter(tmp_path / "stage")


def write_lines(folder, log_every, checkpoint_every, steps, kills, seen):
    """Logs the steps of a stage as training does, from the newest checkpoint after each kill."""
    program = mock.Mock(spec=compiled_model.StageProgram)
    program.spec = types.SimpleNamespace(num_images=4)
    program.method = None
    program.schedule = lambda step: 0.1 * step
    config = types.SimpleNamespace(log_every=log_every, profile_at=0)
    stage = stages.schedule(tiny_config(rounds__count=0), folder)[0]
    stage = dataclasses.replace(stage, steps=steps, folder=folder)
    checkpoints = [0]
    for end in (*kills, steps):
        lines = metric_writer.JsonLinesWriter(folder, checkpoints[-1])
        writer = mock.Mock(spec=metric_writer.MetricWriter, tensorboard=None)
        writer.write_scalars, writer.flush = lines.write_scalars, lines.flush
        log = train._StepLogger(stage, program, writer, checkpoints[-1], config)
        for step in range(checkpoints[-1] + 1, end + 1):
            # A metric of no pixels is NaN; sums of these values depend on their order.
            values = {"loss": 1 / step, "gradient_norm": 0.1, "w": math.nan if step == 2 else 0.3}
            metrics = {name: jax.numpy.asarray(value) for name, value in values.items()}
            log.on_step(step, metrics, mock.Mock(spec=input_pipeline.TrainBatch))
            if step == steps or step % checkpoint_every == 0:
                log.drain()
                metric_writer.write_window(folder, step, log.window())
                checkpoints.append(step)
                seen.add((step % log_every, len(metric_writer._read_windows(folder))))
        if end in kills[1::2] and len(checkpoints) > 1:
            checkpoints.pop()  # It was damaged: the restart goes back to the one before.
        checkpoints = [0, *checkpoints[1:][-2:]]
    text = (folder / metric_writer.METRICS_FILE).read_text()
    clock = "|".join(workdirs.CLOCK_TIMES)
    return re.sub(rf', "({clock})": [^,}}]+', "", text)


def test_a_restart_writes_the_lines_of_an_uninterrupted_stage(tmp_path, monkeypatch):
    progress = lambda **options: lambda step: None  # noqa: E731
    monkeypatch.setattr(train.periodic_actions, "ReportProgress", progress)
    monkeypatch.setattr(train.logger, "info", lambda line: None)
    rng, seen = random.Random(0), set()
    for number in range(40):
        log_every, checkpoint_every, steps = rng.randint(1, 6), rng.randint(1, 6), 17
        kills = sorted(rng.sample(range(1, steps), rng.randint(1, 4)))
        texts = [
            write_lines(
                epath.Path(tmp_path / f"{name}{number}"),
                log_every,
                checkpoint_every,
                steps,
                k,
                seen,
            )
            for name, k in (("whole", []), ("killed", kills))
        ]
        assert texts[0] == texts[1], (log_every, checkpoint_every, kills)
    assert len(seen) > 10


def test_a_window_of_another_form_is_an_empty_one(tmp_path):
    folder = epath.Path(tmp_path)
    content = {"4": {"values": [{"loss": 0.5, "w": 1.0}], "seconds": 2.0, "input_wait": 0.5}}
    (tmp_path / metric_writer.WINDOWS_FILE).write_text(json.dumps(content))
    assert metric_writer.read_window(folder, 4).values == [{"loss": 0.5, "w": 1.0}]
    for text in json_mutants.mutants(content):
        (tmp_path / metric_writer.WINDOWS_FILE).write_text(text)
        window = metric_writer.read_window(folder, 4)
        assert all(isinstance(v, float) for step in window.values for v in step.values()), text
        metric_writer.write_window(folder, 5, window)
