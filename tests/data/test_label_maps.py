"""Label maps are known by the image they belong to and by their pixels."""

import itertools

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from semiseg_jax.data import image_io, label_maps
from tests.errors import raises_code

PALETTE = image_io.generated_palette(3)
TABLE = image_io.id_table(3)


def write(path, labels, image_id):
    path.write_bytes(label_maps.encode(labels, PALETTE, image_id, {"stamp": "s"}))


@pytest.fixture
def labels():
    return np.random.default_rng(0).choice([0, 1, 2, 255], (5, 7)).astype(np.uint8)


@pytest.mark.parametrize("image_id", ["a", "sub/b c", "straße", "写真", "e\u0301"])
def test_a_label_map_comes_back(tmp_path, labels, image_id):
    write(tmp_path / "a.png", labels, image_id)
    np.testing.assert_array_equal(label_maps.read(tmp_path / "a.png", image_id, TABLE), labels)
    assert label_maps.read_text(tmp_path / "a.png", image_id)["stamp"] == "s"


def repaint(path):
    """As an editor that keeps the text: another class in one pixel."""
    image = Image.open(path)
    text = PngImagePlugin.PngInfo()
    for key, value in image.info.items():
        if isinstance(value, str):
            text.add_text(key, value)
    values = np.asarray(image).copy()
    values[2, 3] = (values[2, 3] + 1) % 3
    return values, image.getpalette(), text


def save_as(mode):
    def change(path):
        values, palette, text = repaint(path)
        image = Image.fromarray(values)
        image.putpalette(palette)
        image.convert(mode).save(path, pnginfo=text)

    return change


def transpose(path):
    """The same bytes in another shape."""
    values, _, text = repaint(path)
    Image.fromarray(values.reshape(values.shape[::-1])).save(path, pnginfo=text)


@pytest.mark.parametrize(
    "change",
    [
        *(save_as(mode) for mode in ("P", "L", "RGB", "RGBA", "1")),
        transpose,
        lambda path: write(path, image_io.read_png(path)[0], "another"),
    ],
)
def test_another_label_map_in_its_place_is_refused(tmp_path, labels, change):
    path = tmp_path / "a.png"
    write(path, labels, "a")
    change(path)
    for read in (label_maps.read_text, lambda *args: label_maps.read(*args, TABLE)):
        with raises_code("label-map-changed", "a.png"):
            read(path, "a")


def test_masks_without_a_hash_are_read_as_they_are(tmp_path, labels):
    path = tmp_path / "a.png"
    path.write_bytes(image_io.encode_mask(labels, PALETTE, {"stamp": "s"}))
    np.testing.assert_array_equal(label_maps.read(path, "a", TABLE), labels)
    assert label_maps.read_text(path, "a") == {"stamp": "s"}


def test_exchanged_files_are_refused(tmp_path, labels):
    ids = [f"image {n}" for n in range(3)]
    for name, owner in itertools.permutations(ids, 2):
        write(tmp_path / f"{name}.png", labels, owner)
        with raises_code("label-map-changed", name):
            label_maps.read(tmp_path / f"{name}.png", name, TABLE)
