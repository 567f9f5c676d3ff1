"""Pixel counts by image: their file, and how they are gathered from several processes."""

import json
import types

import numpy as np
import pytest
from etils import epath

from semiseg_jax import evaluate, metrics
from semiseg_jax.comparison import image_counts
from semiseg_jax.comparison.image_counts import ImageCounts
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.logger import capture_lines

CONFUSIONS = {
    "a/1": np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]),
    "b": np.array([[0, 0, 7], [0, 0, 0], [0, 0, 2]]),
    "without a label": np.zeros((3, 3), int),
}
COUNTS = {id_: metrics.class_counts(confusion) for id_, confusion in CONFUSIONS.items()}


def test_counts_are_those_of_the_confusion_matrices():
    assert COUNTS["a/1"].tolist() == [[0, 3, 4, 5], [1, 4, 6, 5]]
    assert COUNTS["b"].tolist() == [[0, 0, 7, 0], [2, 2, 2, 9]]
    counts = ImageCounts("w", COUNTS)
    np.testing.assert_array_equal(counts.iou(3), metrics.iou(sum(CONFUSIONS.values())))
    array = counts.to_array(["b", "a/1"], 3)
    assert array.tolist() == [[[0, 0, 2], [7, 0, 2], [0, 0, 9]], [[3, 4, 0], [4, 6, 0], [5, 5, 0]]]


@pytest.fixture
def path(tmp_path):
    path = epath.Path(tmp_path) / image_counts.EVALUATED
    image_counts.write(path, ImageCounts("w", COUNTS))
    return path


def test_what_is_written_is_read(path):
    read = image_counts.read(path)
    assert read.weights_hash == "w" and read.by_image.keys() == COUNTS.keys()
    assert all((read.by_image[id_] == COUNTS[id_]).all() for id_ in COUNTS)
    assert read.are_of([*COUNTS], 3)
    assert not read.are_of(["a/1", "b"], 3) and not read.are_of([*COUNTS], 2)


@pytest.mark.parametrize("change", ["digit", "seal", "form", "cut", "gone"])
def test_a_damaged_file_is_not_read(path, change):
    text = path.read_text()
    content = json.loads(text)
    if change == "digit":
        path.write_text(text.replace("[0,3,4,5]", "[0,3,4,6]"))
    elif change == "seal":
        del content["hash"]
        path.write_text(json.dumps(content))
    elif change == "form":
        path.write_text(json.dumps(content | {"images": {"b": [[0, 1]]}}))
    elif change == "cut":
        path.write_text(text[:-9])
    else:
        path.unlink()
    assert image_counts.read(path) is None


def test_too_many_counts_are_not_written(path, monkeypatch):
    monkeypatch.setattr(image_counts, "_MAX_LINES", 3)
    with capture_lines() as lines:
        image_counts.write(path, ImageCounts("w", COUNTS))
    assert not path.exists()
    assert lines == [
        "image_counts.json is not written for 3 images: differences in mIoU are given without an "
        "interval."
    ]


@pytest.mark.parametrize("images_per_message", [1, 2, 1000])
def test_counts_of_all_processes_are_gathered_in_parts(monkeypatch, images_per_message):
    """The other process has evaluated one image more, and sends what JSON can hold."""
    own = {"b": COUNTS["b"]}
    others = [(id_, counts.tolist()) for id_, counts in COUNTS.items() if id_ != "b"]
    calls = []

    def all_gather(name, part):
        start = len(calls) * images_per_message
        calls.append(name)
        return json.loads(json.dumps([part, others[start : start + images_per_message]]))

    monkeypatch.setattr(multihost, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "all_gather", all_gather)
    monkeypatch.setattr(evaluate, "_IMAGES_PER_MESSAGE", images_per_message)
    evaluator = types.SimpleNamespace(_dataset=types.SimpleNamespace(evaluation=[*COUNTS]))
    gathered = evaluate.Evaluator._gather_counts(evaluator, own)
    assert gathered.keys() == COUNTS.keys()
    assert all((gathered[id_] == COUNTS[id_]).all() for id_ in COUNTS)
    assert len(calls) == -(-3 // images_per_message)
