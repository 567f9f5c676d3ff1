"""Image and label map files, and atomic writes."""

import os
import struct
import subprocess
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter

from semiseg_jax.data import image_header, image_io
from semiseg_jax.data.mask_format import MaskFormat
from semiseg_jax.runtime import fileio
from tests.errors import raises_code


@pytest.fixture
def mask():
    return np.array([[0, 1, 2], [2, 1, 255]], np.uint8)


def test_palette_indices_are_read_not_luminance(tmp_path, mask):
    image = Image.fromarray(mask)
    image.putpalette([200, 10, 10] * 256)
    image.save(tmp_path / "m.png")
    read = image_io.read_mask(str(tmp_path / "m.png"), image_io.id_table(3))
    np.testing.assert_array_equal(read, mask)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_packed_palettes_are_not_scaled(tmp_path, bits):
    values = np.arange(2, dtype=np.uint8)[None]
    image = Image.fromarray(values)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "m.png", bits=bits)
    read = image_io.read_mask(str(tmp_path / "m.png"), image_io.id_table(2))
    np.testing.assert_array_equal(read, values)


def test_grey_masks_and_mapped_and_ignored_ids(tmp_path):
    Image.fromarray(np.array([[7, 26, 3, 255]], np.uint8)).save(tmp_path / "m.png")
    table = image_io.id_table(2, ignore_ids=(3, 255), id_map=((7, 0), (26, 1)))
    read = image_io.read_mask(str(tmp_path / "m.png"), table)
    np.testing.assert_array_equal(read, [[0, 1, 255, 255]])


def test_unknown_mask_values_are_listed(tmp_path, mask):
    Image.fromarray(mask).save(tmp_path / "m.png")
    with raises_code("mask-values-unknown", "m.png", "values 2,"):
        image_io.read_mask(str(tmp_path / "m.png"), image_io.id_table(2))


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ({"id_map": ((0, 0), (1, 7))}, "mask-value-or-class-out-of-range", "mask value 1 class 7"),
        ({"id_map": ((300, 0),)}, "mask-value-or-class-out-of-range", "mask value 300 class 0"),
        ({"ignore_ids": (300,)}, "mask-value-or-class-out-of-range", "mask value 300 class 255"),
        ({"id_map": ((0, 0), (255, 1))}, "id-map-contradicts-ignore-ids", "mask value 255"),
        ({"id_map": (0, 0, 1, 1)}, "id-map-malformed", "(0, 0, 1, 1)"),
    ],
)
def test_impossible_id_maps_raise(arguments, code, part):
    with raises_code(code, part):
        image_io.id_table(2, **arguments)


def test_0_255_mask_error_has_hint(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "m.png")
    table = image_io.id_table(2, ignore_ids=())
    with raises_code("mask-values-unknown", "data.id_map=((0,0),(255,1))"):
        image_io.read_mask(str(tmp_path / "m.png"), table)


def test_coloured_mask_raises(tmp_path):
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "m.png")
    with raises_code("mask-in-color", "m.png", "(0, 0, 0) in 4 pixels", "mask_channel"):
        image_io.read_mask(str(tmp_path / "m.png"), image_io.id_table(2))


@pytest.mark.parametrize("value", [-1, -256, 256])
def test_mask_integers_outside_8_bits_raise(tmp_path, value):
    path = tmp_path / "m.tif"
    Image.fromarray(np.array([[0, value], [1, 1]], np.int32)).save(path)
    with raises_code("mask-mode-unsupported", "m.tif", "mode I"):
        image_io.read_mask(path, image_io.id_table(2))
    Image.fromarray(np.array([[0, 255], [1, 1]], np.int32)).save(path)
    assert image_io.read_mask(path, image_io.id_table(2)).tolist() == [[0, 255], [1, 1]]


def test_truncated_or_missing_image_raises(tmp_path):
    path = tmp_path / "i.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with raises_code("image-undecodable", "i.jpg"):
        image_io.read_image(str(path))
    with raises_code("image-missing", "none.png"):
        image_io.read_image(str(tmp_path / "none.png"))


@pytest.mark.parametrize("read", [image_io.read_image, image_io.image_size])
@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "the file is empty"), (b"no image", "of no known kind")]
)
def test_error_for_non_image_names_the_reason(tmp_path, read, content, reason):
    (tmp_path / "i.jpg").write_bytes(content)
    with raises_code("image-undecodable", "i.jpg", f"({reason})") as error:
        read(str(tmp_path / "i.jpg"))
    assert "<" not in str(error.value)


def test_16_bit_grey_image_raises(tmp_path):
    Image.fromarray(np.full((2, 2), 4000, np.uint16)).save(tmp_path / "i.png")
    with raises_code("image-depth-unsupported", "i.png"):
        image_io.read_image(str(tmp_path / "i.png"))


def test_encode_mask_round_trip_with_text(tmp_path, mask):
    path = tmp_path / "m.png"
    path.write_bytes(image_io.encode_mask(mask, [(0, 0, 0), (9, 8, 7), (1, 2, 3)], {"stamp": "a"}))
    image = Image.open(path)
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), mask)
    assert tuple(np.asarray(image.convert("RGB"))[0, 1]) == (9, 8, 7)
    assert image_io.read_png(str(path))[1] == {"stamp": "a"}


@pytest.mark.parametrize("size", [(1, 1), (5, 12)])
def test_opencv_reads_colours_of_encoded_masks(size):
    ids = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size) % 4
    palette = ((0, 0, 0), (200, 100, 0), (0, 250, 0), (1, 2, 3))
    content = np.frombuffer(image_io.encode_mask(ids, palette), np.uint8)
    colours = cv2.imdecode(content, cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(colours, np.array(palette, np.uint8)[ids])


def test_generated_palette_equals_pascal_voc():
    assert image_io.generated_palette(5) == (
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128),
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_applies_to_size_and_pixels(tmp_path, suffix, orientation):
    """Orientation n defines the displayed positions of the first row and column of the file."""
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = 255  # the corner of the first row and column
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f"i.{suffix}")
    Image.fromarray(stored).save(
        path, exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
    upright = image_io.read_image(path)
    assert image_io.image_size(path) == upright.shape[:2]
    assert upright.shape[:2] == ((24, 16) if orientation >= 5 else (16, 24))
    # (row, column) of the bright corner, from the table of the EXIF standard.
    expected = {
        1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1),
        8: (-1, 0),
    }[orientation]  # fmt: skip
    for row in (0, -1):
        for column in (0, -1):
            bright = upright[row, column].mean() > 128
            assert bright == ((row, column) == expected)


def test_damaged_exif_is_ignored(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "i.jpg", exif=b"Exif\0\0nonsense")
    assert image_io.image_size(str(tmp_path / "i.jpg")) == (4, 8)
    assert image_io.read_image(str(tmp_path / "i.jpg")).shape == (4, 8, 3)


def test_malformed_tag_does_not_affect_orientation(tmp_path):
    """XResolution is a number; Pillow can read a text in its place, but cannot write it."""
    tags = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x11A, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + tags + bytes(4)
    Image.new("RGB", (8, 4)).save(tmp_path / "i.jpg", exif=exif)
    assert image_io.image_size(tmp_path / "i.jpg") == (8, 4)
    assert image_io.read_image(tmp_path / "i.jpg").shape == (8, 4, 3)


def test_any_decoder_exception_becomes_user_error(tmp_path, monkeypatch):
    """A width that overflows the decoder's integers raises neither OSError nor ValueError."""
    monkeypatch.setattr(image_header, "_max_pixels", 2**40)
    path = tmp_path / "i.bmp"
    Image.new("RGB", (8, 4)).save(path)
    content = bytearray(path.read_bytes())
    content[18:22] = b"\xff" * 4
    path.write_bytes(content)
    with raises_code("image-undecodable", "i.bmp") as error:
        image_io.read_image(path)
    assert isinstance(error.value.__cause__, OverflowError)


def test_grey_palette_and_transparent_images(tmp_path):
    grey = np.arange(16, dtype=np.uint8).reshape(2, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    palette = Image.fromarray(grey)
    palette.putpalette([v for i in range(256) for v in (255 - i, i, 7)])
    palette.save(tmp_path / "palette.png")
    colours = np.stack([grey, grey + 1, grey + 2, np.zeros_like(grey)], -1)
    Image.fromarray(colours, "RGBA").save(tmp_path / "rgba.png")
    read = {n: image_io.read_image(str(tmp_path / f"{n}.png")) for n in ("grey", "palette", "rgba")}
    np.testing.assert_array_equal(read["grey"], np.stack([grey] * 3, -1))
    expected = np.stack([255 - grey, grey, np.full_like(grey, 7)], -1)
    np.testing.assert_array_equal(read["palette"], expected)
    # Transparent pixels keep their colours.
    np.testing.assert_array_equal(read["rgba"], colours[..., :3])


def test_16_bit_colour_image_raises(tmp_path):
    """OpenCV writes the file, because Pillow has no such mode."""
    path = str(tmp_path / "i.png")
    cv2.imwrite(path, np.full((2, 2, 3), 4000, np.uint16))
    for read in (image_io.read_image, image_io.image_size):
        with raises_code("image-depth-unsupported", "mode RGB;16B"):
            read(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_masks_of_every_bit_depth(tmp_path, bits):
    """The test assembles the PNG, because few programs write grey PNGs of less than 8 bits."""
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
    read = image_io.read_mask(str(path), image_io.id_table(8))
    np.testing.assert_array_equal(read, values[None])


def test_count_classes_equals_pixel_counts(tmp_path):
    mask = np.random.default_rng(0).choice([0, 7, 26, 255], (30, 40)).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "m.png")
    table = image_io.id_table(2, ignore_ids=(0, 255), id_map=((7, 1), (26, 0)))
    counts, size = image_io.count_classes(str(tmp_path / "m.png"), table)
    assert size == (30, 40) and counts.sum() == mask.size
    assert (counts[1], counts[0]) == ((mask == 7).sum(), (mask == 26).sum())
    assert counts[255] == ((mask == 0) | (mask == 255)).sum()


# --- Files of any content ------------------------------------------------------------------------


def test_failed_write_keeps_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "f"
    fileio.write_bytes(path, b"old")

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fileio.os, "replace", full_disk)
    with raises_code("path-unwritable", "No space left on device"):
        fileio.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_content_is_synced_before_rename_and_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append(("sync", os.path.getsize(path) if os.path.isfile(path) else path))
        fsync(descriptor)

    def recording_replace(source, target):
        calls.append(("rename", os.fspath(target)))
        replace(source, target)

    monkeypatch.setattr(fileio.os, "fsync", recording_fsync)
    monkeypatch.setattr(fileio.os, "replace", recording_replace)
    folder = tmp_path / "new"
    fileio.write_bytes(folder / "f", b"content")
    assert calls == [("sync", 7), ("rename", str(folder / "f")), ("sync", str(folder))]
    calls.clear()
    fileio.write_bytes(folder / "f", b"of many", sync=False)
    assert calls == [("rename", str(folder / "f"))]


def test_remove_leftovers_removes_only_dead_temporaries(tmp_path, monkeypatch):
    dead = subprocess.Popen(["true"])
    dead.wait()
    folder, linked_folder = tmp_path / "output", tmp_path / "elsewhere"
    for parent in (folder / "deep", linked_folder):
        parent.mkdir(parents=True)
    (folder / "link").symlink_to(linked_folder)
    monkeypatch.setattr(fileio.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # leaves the temporary file, like a killed process
        fileio.write_bytes(folder / "a b.png", b"cut")
    leftovers = [folder / f".c.png.0-{dead.pid}.tmp", folder / "deep" / f".d.12-{dead.pid}.tmp"]
    other_files = [
        folder / ".other.tmp",
        folder / "deep" / ".swap.0-x.tmp",
        folder / f"visible.png.0-{dead.pid}.tmp",
        folder / f".busy.png.0-{os.getppid()}.tmp",
        linked_folder / f".c.png.0-{dead.pid}.tmp",
    ]
    for path in (*leftovers, *other_files):
        path.write_bytes(b"")
    assert len(list(folder.glob(".a b.png.*.tmp"))) == 1
    fileio.remove_leftovers(folder)
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(other_files)
    fileio.remove_leftovers(tmp_path / "none")


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_soft_masks_of_two_classes_point_to_the_threshold(tmp_path, suffix, quality):
    """A mask of 0 and 255, saved as JPEG or blurred."""
    rows, columns = np.mgrid[:64, :64]
    mask = Image.fromarray(
        np.where((rows - 32) ** 2 + (columns - 30) ** 2 < 500, 255, 0).astype(np.uint8)
    )
    if suffix == ".png":
        mask = mask.filter(ImageFilter.GaussianBlur(quality / 60))
    mask.save(tmp_path / f"m{suffix}", quality=quality)
    reason = "it is a JPEG" if suffix == ".jpg" else "soft edges"
    for ignore_ids in ((255,), ()):
        with raises_code("mask-values-unknown", reason, "--config.data.mask_threshold=128"):
            image_io.read_mask(tmp_path / f"m{suffix}", image_io.id_table(2, ignore_ids))
    form = MaskFormat(threshold=128)
    read = image_io.read_mask(tmp_path / f"m{suffix}", image_io.id_table(2), form)
    expected = (rows - 32) ** 2 + (columns - 30) ** 2 < 500
    assert (read == expected).mean() > 0.98 and set(np.unique(read)) == {0, 1}


def test_a_soft_mask_in_three_channels_points_to_the_threshold(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[10:20, 10:20] = 255
    image = Image.fromarray(mask).filter(ImageFilter.GaussianBlur(1)).convert("RGB")
    image.save(tmp_path / "m.jpg")
    with raises_code("mask-in-color", "--config.data.mask_threshold=128"):
        image_io.read_mask(tmp_path / "m.jpg", image_io.id_table(2))
    read = image_io.read_mask(tmp_path / "m.jpg", image_io.id_table(2), MaskFormat(threshold=128))
    assert (read == (mask > 0)).mean() > 0.99 and set(np.unique(read)) == {0, 1}


def test_a_jpeg_of_class_ids_points_to_its_source(tmp_path):
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 5, (32, 32), np.uint8) * 9)
    mask.save(tmp_path / "m.jpg")
    with raises_code("mask-values-unknown", "it is a JPEG", "from its source"):
        image_io.read_mask(tmp_path / "m.jpg", image_io.id_table(5))


@pytest.mark.parametrize("levels", [(0, 60, 120), (0, 1, 2), (0, 127)])
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_a_jpeg_of_mostly_one_class_is_no_binary_mask(tmp_path, levels, quality):
    mask = np.zeros((64, 64), np.uint8)
    for number, level in enumerate(levels):
        mask[8 * number : 8 * number + 8, 10:40] = level
    mask[::16, ::16] = 30
    Image.fromarray(mask).save(tmp_path / "m.jpg", quality=quality)
    with raises_code("mask-values-unknown", "from its source"):
        image_io.read_mask(tmp_path / "m.jpg", image_io.id_table(3))


def test_few_soft_values_between_two_classes(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[10:20, 10:20] = 255
    mask[9, 10:20], mask[20, 10:20], mask[10:20, 9] = 64, 128, 191
    Image.fromarray(mask).save(tmp_path / "m.png")
    with raises_code("mask-values-unknown", "soft edges"):
        image_io.read_mask(tmp_path / "m.png", image_io.id_table(2))
    with raises_code("mask-values-unknown", "give them in data.id_map"):
        image_io.read_mask(tmp_path / "m.png", image_io.id_table(4))
