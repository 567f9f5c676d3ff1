"""Label maps and what is kept beside them, of probabilities by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from semiseg_jax import health
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data import labels, sources
from semiseg_jax.errors import UserError
from semiseg_jax.models import deeplab
from semiseg_jax.pseudo_labels import Labeler

# 255 * 0.6 is 153.
PROBABILITIES = jnp.array([0.1, 0.6, 0.3])


@pytest.fixture
def label(config_of_pairs, tmp_path):
    """Labels every pixel with class 1, whatever the network; the folder is labels/maps."""
    config = config_of_pairs
    config.pseudo.keep_confidence = True
    # Fewer images at a time than devices, of which one has an empty image.
    config.pseudo.batch = 1
    mesh = mesh_lib.make_mesh(jax.devices()[:2])
    model = deeplab.build(config.model, 3)
    colour = np.zeros(3, np.uint8)
    variables = {"params": {}, "batch_stats_weak": {}}
    folder = tmp_path / "labels" / "maps"

    def start():
        labeler = Labeler(model, sources.load(config), config, mesh, colour)
        labeler._predictor = lambda _, images: jnp.broadcast_to(
            PROBABILITIES, (*images.shape[:3], 3)
        )
        return labeler(variables, "a teacher", folder, lambda *_: None, print)

    return start


def test_confidence_is_a_grey_image_of_each_pixel(label, tmp_path):
    manifest = label()
    kept = sorted((tmp_path / "labels" / "pseudo_confidence").rglob("*.png"))
    assert len(kept) == len(manifest["images"]) == 8
    for path in kept:
        name = str(path.relative_to(tmp_path / "labels" / "pseudo_confidence").with_suffix(""))
        entry = manifest["images"][name]
        grey = np.asarray(Image.open(path))
        assert list(grey.shape) == entry["size"] and np.all(grey == 153)
        assert entry["histogram"] == {"1": grey.size}
        assert entry["mean_confidence"] == pytest.approx(0.6, rel=1e-5)


def test_no_label_map_without_its_confidence(label, tmp_path, monkeypatch):
    """Else the next start would take the image for done."""
    write = labels.write_bytes

    def full(path, content, **how):
        if "pseudo_confidence" in str(path):
            raise UserError("full")
        write(path, content, **how)

    monkeypatch.setattr(labels, "write_bytes", full)
    with pytest.raises(UserError, match="full"):
        label()
    assert not list((tmp_path / "labels").rglob("*.png"))
    monkeypatch.setattr(labels, "write_bytes", write)
    assert len(label()["images"]) == 8
    assert len(list((tmp_path / "labels" / "pseudo_confidence").rglob("*.png"))) == 8


def test_confidence_that_is_wanted_later_is_made_then(label, config_of_pairs, tmp_path):
    config_of_pairs.pseudo.keep_confidence = False
    first = label()
    assert not (tmp_path / "labels" / "pseudo_confidence").exists()
    config_of_pairs.pseudo.keep_confidence = True
    assert label()["images"] == first["images"]
    assert len(list((tmp_path / "labels" / "pseudo_confidence").rglob("*.png"))) == 8


@pytest.mark.parametrize("earlier", [None, "", '{"images": {'])
def test_a_round_whose_labels_are_gone_is_not_compared_with(
    label, config_of_pairs, tmp_path, earlier
):
    manifest = label()
    folder, before = epath.Path(tmp_path / "labels" / "maps"), epath.Path(tmp_path / "before")
    if earlier is not None:
        before.mkdir()
        (before / "manifest.json").write_text(earlier)
    line, *_ = health.check(folder, manifest, sources.load(config_of_pairs), before)
    assert line.endswith(
        f"not compared with the round before: {before}/manifest.json is missing or damaged"
    )
    assert "changed" not in json.loads((folder / "health.json").read_text())


@pytest.mark.parametrize("left", [b"", bytes(900)], ids=["empty", "zeros"])
@pytest.mark.parametrize("manifest", [True, False])
def test_what_a_power_cut_leaves_of_a_label_map_is_made_again(label, tmp_path, left, manifest):
    """Label maps are not synced: their names may be on the disk and their content not."""
    label()
    folder = tmp_path / "labels" / "maps"
    path = min(folder.rglob("*.png"))
    whole = path.read_bytes()
    path.write_bytes(left)
    if not manifest:
        (folder / "manifest.json").unlink()
    label()
    assert path.read_bytes() == whole
