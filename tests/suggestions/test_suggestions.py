"""Measures, diversity, faults and fingerprints by values computed by hand."""

import json

import numpy as np
import pytest

from semiseg_jax.data import image_io
from semiseg_jax.suggestions import (
    corrected,
    diversity,
    faults,
    fingerprints,
    ranking,
    uncertainty,
)

PALETTE = ((0, 0, 0), (255, 0, 0))


def test_entropy_is_a_mean_whatever_the_size():
    small = np.full((2, 2, 4), 0.25, np.float32)
    small[0] = (1, 0, 0, 0)
    large = np.tile(small, (8, 8, 1))
    for image in (small, large):
        measured = uncertainty.measure([image])
        assert measured.entropy == pytest.approx(0.5)
        assert measured.margin == pytest.approx(0.5)
        assert measured.views is None


def test_views_that_disagree():
    one = np.array([[[0.9, 0.1], [0.9, 0.1]]], np.float32)
    other = np.array([[[0.9, 0.1], [0.2, 0.8]]], np.float32)
    assert uncertainty.measure([one, other]).views == pytest.approx(0.25)


def test_suggestions_do_not_waste_an_evening_on_neighbours():
    features = np.array([[1.0, 0], [1.0, 0.01], [0, 1.0]])
    order, _ = diversity.spread(features, np.zeros((1, 2)), np.array([1.0, 0.99, 0.5]), 2)
    assert order.tolist() == [0, 2]


def test_black_and_blurred_images_are_set_aside():
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    blurred = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], (1, 32, 3))
    images = {"a": sharp, "b": sharp, "c": sharp, "black": 0 * sharp, "blurred": blurred}
    found = faults.find({name: faults.measure(image) for name, image in images.items()})
    assert found.keys() == {"black", "blurred"}
    assert "black" in found["black"] and "Laplacian" in found["blurred"]


def test_classes_without_labels_lack_most():
    np.testing.assert_allclose(ranking.deficits(np.array([90, 10, 0, 0])), [0, 0.6, 1, 1])


def test_untouched_suggestions_are_recognised_after_a_tool_saved_them(tmp_path):
    shape = {"label": "car", "points": [[0, 0], [4, 0], [4, 4]], "shape_type": "polygon"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"shapes": [shape], "imagePath": "a.jpg"}))
    written = fingerprints.of_labelme(path)
    saved = {**shape, "points": [[0.0, 0.0], [4.0, 0.0], [4.0, 4.0]], "flags": {}}
    path.write_text(json.dumps({"version": "9", "shapes": [saved], "imagePath": "a.jpg"}, indent=2))
    assert fingerprints.of_labelme(path) == written
    path.write_text(json.dumps({"shapes": [{**shape, "label": "sky"}], "imagePath": "a.jpg"}))
    assert fingerprints.of_labelme(path) != written


def test_untouched_labels_are_not_taken_for_truth(tmp_path):
    entries = []
    for name in ("a.png", "b.png"):
        path = tmp_path / "masks" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_io.encode_mask(np.zeros((3, 4), np.uint8), PALETTE))
        written = {"labelme": "", "coco": "", "mask": fingerprints.of_mask(path)}
        entries.append({"id": name[0], "name": name, "size": [3, 4], "written": written})
    folder = corrected.Folder(tmp_path, entries, ("sky", "road"), PALETTE)
    assert folder.changed() == {}
    labels = np.eye(3, 4, dtype=np.uint8)
    (tmp_path / "masks" / "b.png").write_bytes(image_io.encode_mask(labels, PALETTE))
    assert folder.changed() == {"b": "mask"}
    np.testing.assert_array_equal(folder.label_map(entries[1], "mask"), labels)
