import os
import struct
import subprocess
import zlib

import cv2
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
        ({"id_map": ((0, 0), (255, 1))}, "mask value 255 a class, and data.ignore_ids ignores it"),
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


@pytest.mark.parametrize("value", [-1, -256, 256])
def test_integers_that_eight_bits_do_not_hold_are_refused(tmp_path, value):
    path = tmp_path / "m.tif"
    Image.fromarray(np.array([[0, value], [1, 1]], np.int32)).save(path)
    with pytest.raises(UserError, match=r"m\.tif holds .* outside 0 to 255 \(mode I\)"):
        labels.read_mask(path, labels.id_table(2))
    Image.fromarray(np.array([[0, 255], [1, 1]], np.int32)).save(path)
    assert labels.read_mask(path, labels.id_table(2)).tolist() == [[0, 255], [1, 1]]


def test_a_truncated_image_is_one_sentence(tmp_path):
    path = tmp_path / "i.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match="truncated, corrupt or not an image"):
        labels.read_image(str(path))
    with pytest.raises(UserError, match=r"none\.png is missing"):
        labels.read_image(str(tmp_path / "none.png"))


@pytest.mark.parametrize("read", [labels.read_image, labels.image_size])
@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "the file is empty"), (b"no image", "of no known kind")]
)
def test_what_is_no_image_is_said_in_words(tmp_path, read, content, reason):
    (tmp_path / "i.jpg").write_bytes(content)
    with pytest.raises(UserError, match=rf"i\.jpg [\w ]+ \({reason}\): ") as refused:
        read(str(tmp_path / "i.jpg"))
    assert "<" not in str(refused.value)


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


@pytest.mark.parametrize("size", [(1, 1), (5, 12)])
def test_other_readers_see_the_colours_of_encoded_masks(size):
    ids = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size) % 4
    palette = ((0, 0, 0), (200, 100, 0), (0, 250, 0), (1, 2, 3))
    content = np.frombuffer(labels.encode_mask(ids, palette), np.uint8)
    seen = cv2.imdecode(content, cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(seen, np.array(palette, np.uint8)[ids])


def test_writing_leaves_the_old_file_or_the_new_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "f"
    labels.write_bytes(path, b"old")

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(labels.os, "replace", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        labels.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_the_disk_has_a_file_before_its_name_and_then_the_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace

    def synced(opened):
        at = os.readlink(f"/proc/self/fd/{opened}")
        done.append(("sync", os.path.getsize(at) if os.path.isfile(at) else at))
        sync(opened)

    def replaced(source, target):
        done.append(("name", os.fspath(target)))
        replace(source, target)

    monkeypatch.setattr(labels.os, "fsync", synced)
    monkeypatch.setattr(labels.os, "replace", replaced)
    folder = tmp_path / "new"
    labels.write_bytes(folder / "f", b"content")
    assert done == [("sync", 7), ("name", str(folder / "f")), ("sync", str(folder))]
    done.clear()
    labels.write_bytes(folder / "f", b"of many", sync=False)
    assert done == [("name", str(folder / "f"))]


def test_leftovers_are_removed_and_no_other_file(tmp_path, monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    folder, elsewhere = tmp_path / "output", tmp_path / "elsewhere"
    for place in (folder / "deep", elsewhere):
        place.mkdir(parents=True)
    (folder / "link").symlink_to(elsewhere)
    monkeypatch.setattr(labels.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # as where it is killed
        labels.write_bytes(folder / "a b.png", b"cut")
    leftovers = [folder / f".c.png.0-{gone.pid}.tmp", folder / "deep" / f".d.12-{gone.pid}.tmp"]
    others = [
        folder / ".other.tmp",
        folder / "deep" / ".swap.0-x.tmp",
        folder / f"seen.png.0-{gone.pid}.tmp",
        folder / f".busy.png.0-{os.getppid()}.tmp",
        elsewhere / f".c.png.0-{gone.pid}.tmp",
    ]
    for path in (*leftovers, *others):
        path.write_bytes(b"")
    assert len(list(folder.glob(".a b.png.*.tmp"))) == 1
    labels.remove_leftovers(folder)
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(others)
    labels.remove_leftovers(tmp_path / "none")


def test_generated_palette_is_that_of_pascal_voc():
    assert labels.generated_palette(5) == (
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128),
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_the_same_for_sizes_and_pixels(tmp_path, suffix, orientation):
    """Orientation n says where the first row and column are shown; n = 1: where they are."""
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = 255  # the corner of first row and column
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f"i.{suffix}")
    Image.fromarray(stored).save(
        path, exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
    shown = labels.read_image(path)
    assert labels.image_size(path) == shown.shape[:2]
    assert shown.shape[:2] == ((24, 16) if orientation >= 5 else (16, 24))
    # row, column of the bright corner, from the table of the EXIF standard
    expected = {
        1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1),
        8: (-1, 0),
    }[orientation]  # fmt: skip
    for row in (0, -1):
        for column in (0, -1):
            bright = shown[row, column].mean() > 128
            assert bright == ((row, column) == expected)


def test_damaged_exif_beside_sound_pixels_is_left_alone(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "i.jpg", exif=b"Exif\0\0nonsense")
    assert labels.image_size(str(tmp_path / "i.jpg")) == (4, 8)
    assert labels.read_image(str(tmp_path / "i.jpg")).shape == (4, 8, 3)


def test_a_malformed_tag_beside_the_orientation_is_left_alone(tmp_path):
    """Text as XResolution, which is a number: Pillow reads it and cannot write it."""
    tags = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x11A, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + tags + bytes(4)
    Image.new("RGB", (8, 4)).save(tmp_path / "i.jpg", exif=exif)
    assert labels.image_size(tmp_path / "i.jpg") == (8, 4)
    assert labels.read_image(tmp_path / "i.jpg").shape == (8, 4, 3)


def test_whatever_the_decoder_raises_is_one_sentence(tmp_path):
    """A width that no integer of the decoder holds: neither an OSError nor a ValueError."""
    path = tmp_path / "i.bmp"
    Image.new("RGB", (8, 4)).save(path)
    content = bytearray(path.read_bytes())
    content[18:22] = b"\xff" * 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"i\.bmp cannot be decoded \(.*\): it is truncated") as end:
        labels.read_image(path)
    assert isinstance(end.value.__cause__, OverflowError)


def test_grey_palette_and_transparent_images(tmp_path):
    grey = np.arange(16, dtype=np.uint8).reshape(2, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    palette = Image.fromarray(grey)
    palette.putpalette([v for i in range(256) for v in (255 - i, i, 7)])
    palette.save(tmp_path / "palette.png")
    colours = np.stack([grey, grey + 1, grey + 2, np.zeros_like(grey)], -1)
    Image.fromarray(colours, "RGBA").save(tmp_path / "rgba.png")
    read = {n: labels.read_image(str(tmp_path / f"{n}.png")) for n in ("grey", "palette", "rgba")}
    np.testing.assert_array_equal(read["grey"], np.stack([grey] * 3, -1))
    expected = np.stack([255 - grey, grey, np.full_like(grey, 7)], -1)
    np.testing.assert_array_equal(read["palette"], expected)
    # Wholly transparent, and seen all the same.
    np.testing.assert_array_equal(read["rgba"], colours[..., :3])


def test_sixteen_bits_of_each_colour_are_refused_rather_than_cut(tmp_path):
    """OpenCV as the writer: Pillow has no such images."""
    path = str(tmp_path / "i.png")
    cv2.imwrite(path, np.full((2, 2, 3), 4000, np.uint16))
    for read in (labels.read_image, labels.image_size):
        with pytest.raises(UserError, match=r"more than 8 bits a channel \(mode RGB;16B\)"):
            read(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_masks_of_every_depth_hold_the_values_written(tmp_path, bits):
    """A PNG put together by hand, because few writers make grey ones of less than 8 bits."""
    values = np.arange(8, dtype=np.uint8) % min(2**bits, 8)
    if bits == 16:
        row = b"".join(bytes((0, v)) for v in values)
    else:
        row = np.packbits(np.unpackbits(values[:, None], axis=1)[:, 8 - bits :]).tobytes()

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    path = tmp_path / "m.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    read = labels.read_mask(str(path), labels.id_table(8))
    np.testing.assert_array_equal(read, values[None])


def test_counts_are_those_of_the_pixels(tmp_path):
    mask = np.random.default_rng(0).choice([0, 7, 26, 255], (30, 40)).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "m.png")
    table = labels.id_table(2, ignore_ids=(0, 255), id_map=((7, 1), (26, 0)))
    counts, size = labels.count_classes(str(tmp_path / "m.png"), table)
    assert size == (30, 40) and counts.sum() == mask.size
    assert (counts[1], counts[0]) == ((mask == 7).sum(), (mask == 26).sum())
    assert counts[255] == ((mask == 0) | (mask == 255)).sum()
