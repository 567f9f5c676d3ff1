import shutil

import jax
import numpy as np
import pytest
import tensorflow as tf
from clu import metric_writers

from semiseg_jax import summaries
from semiseg_jax.errors import UserError

FULL = r"stage cannot be written \(No space left on device\): free space or give another folder"


def fill(disk):
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))


def test_a_full_disk_is_one_sentence_as_it_begins(small_disk):
    fill(small_disk)
    with pytest.raises(UserError, match=FULL):
        summaries.Writer(small_disk / "stage")


@pytest.mark.parametrize(
    "write",
    [
        lambda writer, step: (writer.write_scalars(step, {"loss": 1.0}), writer.flush()),
        # Which TensorFlow flushes by itself from time to time.
        lambda writer, step: writer.write_scalars(step, {"loss": 1.0}),
        lambda writer, step: writer.write_histograms(step, {"norm": np.arange(9.0)}),
    ],
)
def test_a_full_disk_is_one_sentence_as_it_goes_on(small_disk, write):
    writer = summaries.Writer(small_disk / "stage")
    fill(small_disk)
    with pytest.raises(UserError, match=FULL):
        for step in range(1000):
            write(writer, step)


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
def test_whichever_call_meets_it(tmp_path, monkeypatch, call, arguments):
    def full(*_):
        raise tf.errors.ResourceExhaustedError(
            None, None, "{{function_node __wrapped__}} events; No space left on device\n\tFailed"
        )

    monkeypatch.setattr(metric_writers.MultiWriter, call, full)
    with pytest.raises(UserError, match=FULL):
        getattr(summaries.Writer(tmp_path / "stage"), call)(*arguments)


def test_a_full_disk_is_one_sentence_for_a_profile(small_disk):
    jax.profiler.start_trace(str(small_disk / "stage"))
    fill(small_disk)
    with pytest.raises(UserError, match=FULL), summaries.writing(small_disk / "stage"):
        jax.profiler.stop_trace()


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path):
    (tmp_path / "stage").write_text("")
    with pytest.raises(UserError, match=r"stage cannot be written \(Not a directory\)"):
        summaries.Writer(tmp_path / "stage")
