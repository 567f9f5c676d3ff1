"""Label maps, confidence maps and statistics of given probabilities."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import pseudo_label_stats, pseudo_labels
from semiseg_jax.data import load
from semiseg_jax.models import deeplab
from semiseg_jax.pseudo_labels import Labeler
from semiseg_jax.runtime import fileio
from semiseg_jax.runtime.errors import UserError
from tests.errors import raises_code

# 255 * 0.6 is 153.
PROBABILITIES = jnp.array([0.1, 0.6, 0.3])


@pytest.fixture
def label(config_of_pairs, tmp_path, monkeypatch):
    """Returns a function that labels every pixel with class 1, in the folder labels/maps."""
    config = config_of_pairs
    config.pseudo.keep_confidence = True
    # Fewer images per batch than devices, so that one device receives an empty image.
    config.pseudo.batch = 1
    mesh = mesh_lib.make_mesh(jax.devices()[:2])
    model = deeplab.build(config.model, 3)
    pad_value = np.zeros(3, np.uint8)
    variables = {"params": {}, "batch_stats_weak": {}}
    folder = tmp_path / "labels" / "maps"

    def predict(_, images):
        return jnp.broadcast_to(PROBABILITIES, (*images.shape[:3], 3))

    monkeypatch.setattr(pseudo_labels, "Predictor", lambda *_: predict)

    def run_labeler():
        labeler = Labeler(model, load.load_dataset(config), config, mesh, pad_value)
        return labeler(variables, "a teacher", folder, lambda *_: None)

    return run_labeler


def test_a_confidence_map_contains_the_confidence_of_each_pixel(label, tmp_path):
    manifest = label()
    paths = sorted((tmp_path / "labels" / "pseudo_confidence").rglob("*.png"))
    assert len(paths) == len(manifest["images"]) == 8
    for path in paths:
        name = str(path.relative_to(tmp_path / "labels" / "pseudo_confidence").with_suffix(""))
        entry = manifest["images"][name]
        grey = np.asarray(Image.open(path))
        assert list(grey.shape) == entry["size"] and np.all(grey == 153)
        assert entry["histogram"] == {"1": grey.size}
        assert entry["mean_confidence"] == pytest.approx(0.6, rel=1e-5)


def test_pseudo_labels_are_read_with_their_ids_and_confidences(label, config_of_pairs, tmp_path):
    manifest = label()
    labels = pseudo_labels.read(tmp_path / "labels" / "maps")
    assert list(labels) == list(manifest["images"]) and len(labels) == 8
    assert set(labels) == {e.id for e in load.load_dataset(config_of_pairs).unlabeled}
    for name, read in labels.items():
        assert read.id == name and list(read.classes.shape) == manifest["images"][name]["size"]
        assert read.classes.dtype == np.uint8 and np.all(read.classes == 1)
        assert read.mean_confidence == labels.mean_confidences[name]
        assert read.mean_confidence == pytest.approx(0.6, rel=1e-5)
        assert read.confidence.shape == read.classes.shape
        np.testing.assert_allclose(read.confidence, 0.6, atol=1 / 255)
    with pytest.raises(KeyError):
        labels["no image"]
    # Without pseudo.keep_confidence.
    for path in (tmp_path / "labels" / "pseudo_confidence").rglob("*.png"):
        path.unlink()
    assert labels[min(labels)].confidence is None
    # A label map of another image is not taken for this one.
    first, second = sorted(labels)[:2]
    maps = tmp_path / "labels" / "maps"
    (maps / f"{first}.png").write_bytes((maps / f"{second}.png").read_bytes())
    with raises_code("label-map-changed", first):
        labels[first]
    for folder in (tmp_path, tmp_path / "missing"):
        with raises_code("pseudo-labels-missing", "manifest.json is missing or damaged"):
            pseudo_labels.read(folder)


def test_a_label_map_is_written_after_its_confidence_map(label, tmp_path, monkeypatch):
    """Otherwise the next call would skip the image."""
    write = fileio.write_bytes

    def fail_for_confidence(path, content, **kwargs):
        if "pseudo_confidence" in str(path):
            raise UserError("full")
        write(path, content, **kwargs)

    monkeypatch.setattr(fileio, "write_bytes", fail_for_confidence)
    with pytest.raises(UserError, match="full"):
        label()
    assert not list((tmp_path / "labels").rglob("*.png"))
    monkeypatch.setattr(fileio, "write_bytes", write)
    assert len(label()["images"]) == 8
    assert len(list((tmp_path / "labels" / "pseudo_confidence").rglob("*.png"))) == 8


def test_missing_confidence_maps_are_added_later(label, config_of_pairs, tmp_path):
    config_of_pairs.pseudo.keep_confidence = False
    first = label()
    assert not (tmp_path / "labels" / "pseudo_confidence").exists()
    config_of_pairs.pseudo.keep_confidence = True
    assert label()["images"] == first["images"]
    assert len(list((tmp_path / "labels" / "pseudo_confidence").rglob("*.png"))) == 8


@pytest.mark.parametrize("content", [None, "", '{"images": {'])
def test_a_previous_round_without_manifest_is_not_compared(
    label, config_of_pairs, tmp_path, content
):
    manifest = label()
    folder, previous = epath.Path(tmp_path / "labels" / "maps"), epath.Path(tmp_path / "before")
    if content is not None:
        previous.mkdir()
        (previous / "manifest.json").write_text(content)
    line, *_ = pseudo_label_stats.write_stats(
        folder, manifest, load.load_dataset(config_of_pairs), previous
    )
    assert line.endswith(
        f"not compared with the round before: {previous}/manifest.json is missing or damaged"
    )
    assert "changed" not in json.loads((folder / "health.json").read_text())


@pytest.mark.parametrize("damaged", [b"", bytes(900)], ids=["empty", "zeros"])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_damaged_label_map_is_written_again(label, tmp_path, damaged, has_manifest):
    """Label maps are not synced: after a power cut the file may exist without its content."""
    label()
    folder = tmp_path / "labels" / "maps"
    path = min(folder.rglob("*.png"))
    content = path.read_bytes()
    path.write_bytes(damaged)
    if not has_manifest:
        (folder / "manifest.json").unlink()
    label()
    assert path.read_bytes() == content


@pytest.mark.parametrize("pattern", ["manifest.json", "*.png"])
def test_an_unreadable_file_raises_a_user_error(label, tmp_path, closed, pattern):
    label()
    path = min((tmp_path / "labels" / "maps").rglob(pattern))
    closed(path)
    with pytest.raises(UserError) as raised:
        label()
    assert str(raised.value) == f"{path} cannot be read (Permission denied): make it readable."


def test_an_unreadable_manifest_of_the_previous_round_raises_a_user_error(
    label, config_of_pairs, tmp_path, closed
):
    folder, previous = epath.Path(tmp_path / "labels" / "maps"), epath.Path(tmp_path / "before")
    manifest = label()
    previous.mkdir()
    (previous / "manifest.json").write_text("{}")
    closed(previous / "manifest.json")
    with raises_code("path-unreadable", "/before/manifest.json"):
        pseudo_label_stats.write_stats(
            folder, manifest, load.load_dataset(config_of_pairs), previous
        )
