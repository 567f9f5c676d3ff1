import numpy as np
import pytest
from PIL import Image

from semiseg_jax.data import labels
from semiseg_jax.errors import UserError


@pytest.fixture
def mask():
    return np.array([[0, 1, 2], [2, 1, 255]], np.uint8)


def test_palette_indices_are_read_not_luminance(tmp_path, mask):
    image = Image.fromarray(mask)
    image.putpalette([200, 10, 10] * 256)
    image.save(tmp_path / "m.png")
    read = labels.read_mask(str(tmp_path / "m.png"), labels.id_table(3))
    np.testing.assert_array_equal(read, mask)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_packed_palettes_are_not_scaled(tmp_path, bits):
    values = np.arange(2, dtype=np.uint8)[None]
    image = Image.fromarray(values)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "m.png", bits=bits)
    read = labels.read_mask(str(tmp_path / "m.png"), labels.id_table(2))
    np.testing.assert_array_equal(read, values)


def test_grey_masks_and_mapped_and_ignored_ids(tmp_path):
    Image.fromarray(np.array([[7, 26, 3, 255]], np.uint8)).save(tmp_path / "m.png")
    table = labels.id_table(2, ignore_ids=(3, 255), id_map=((7, 0), (26, 1)))
    read = labels.read_mask(str(tmp_path / "m.png"), table)
    np.testing.assert_array_equal(read, [[0, 1, 255, 255]])


def test_unknown_values_are_named(tmp_path, mask):
    Image.fromarray(mask).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m\.png holds the values 2, which are neither"):
        labels.read_mask(str(tmp_path / "m.png"), labels.id_table(2))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"id_map": ((0, 0), (1, 7))}, "mask value 1 class 7"),
        ({"id_map": ((300, 0),)}, "mask value 300 class 0"),
        ({"ignore_ids": (300,)}, "mask value 300 class 255"),
        ({"id_map": (0, 0, 1, 1)}, "make it .*mask value, class id"),
    ],
)
def test_impossible_id_maps_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        labels.id_table(2, **arguments)


def test_a_0_255_mask_gets_the_hint(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "m.png")
    table = labels.id_table(2, ignore_ids=())
    with pytest.raises(UserError, match="map 255 to class 1"):
        labels.read_mask(str(tmp_path / "m.png"), table)


def test_a_coloured_mask_is_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(UserError, match="holds colours"):
        labels.read_mask(str(tmp_path / "m.png"), labels.id_table(2))


def test_a_truncated_image_is_one_sentence(tmp_path):
    path = tmp_path / "i.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match="truncated, corrupt or not an image"):
        labels.read_image(str(path))
    with pytest.raises(UserError, match=r"none\.png is missing"):
        labels.read_image(str(tmp_path / "none.png"))


def test_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 4000, np.uint16)).save(tmp_path / "i.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        labels.read_image(str(tmp_path / "i.png"))


def test_encoded_masks_come_back_with_their_text(tmp_path, mask):
    path = tmp_path / "m.png"
    path.write_bytes(labels.encode_mask(mask, [(0, 0, 0), (9, 8, 7), (1, 2, 3)], {"stamp": "a"}))
    image = Image.open(path)
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), mask)
    assert tuple(np.asarray(image.convert("RGB"))[0, 1]) == (9, 8, 7)
    assert labels.read_text(str(path)) == {"stamp": "a"}


def test_writing_leaves_the_old_file_or_the_new_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "f"
    labels.write_bytes(path, b"old")

    def full_disk(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(labels.epath.Path(path)), "write_bytes", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        labels.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_generated_palette_is_that_of_pascal_voc():
    assert labels.generated_palette(5) == (
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128),
    )  # fmt: skip
