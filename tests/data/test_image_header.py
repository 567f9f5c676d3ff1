"""Which files are opened, and what is said of them: formats, bits, size, pages, orientation."""

import io
import itertools
import os
import socket
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image

from semiseg_jax.data import file_warnings, image_header, image_io
from semiseg_jax.data.dataset import Example
from tests.data import image_corpus
from tests.errors import raises_code

ALL_VALUES = np.arange(256, dtype=np.int16)  # The table that maps each mask value to itself.
READERS = [
    image_io.image_size,
    image_io.read_image,
    lambda path: image_io.read_mask(path, ALL_VALUES),
    lambda path: image_io.count_classes(path, ALL_VALUES),
]


@pytest.fixture
def limit():
    """Sets the largest number of pixels for one test."""
    yield image_header.set_max_pixels
    image_header.set_max_pixels(image_header.DEFAULT_MAX_PIXELS)


def saved(image, format_, **options):
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


# --- Bits ----------------------------------------------------------------------------------------


def test_every_format_and_mode_is_read_as_it_was_written(tmp_path):
    """The corpus at one width, whose rows and offsets hold the digits 16 in many places."""
    image_corpus.check(image_corpus.by_pillow(widths=(540,)), tmp_path / "file")


def test_bits_are_those_of_a_channel_not_of_a_pixel(tmp_path):
    """A BMP of 16 bits a pixel has 5 or 6 bits a channel; the test assembles it."""
    path = tmp_path / "i.bmp"
    for masks in ((0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F)):
        header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
        pixels = struct.pack("<HH", masks[0], masks[2])
        content = header + struct.pack("<III", *masks) + pixels
        path.write_bytes(b"BM" + struct.pack("<IHHI", 14 + len(content), 0, 0, 66) + content)
        assert image_io.read_image(path).tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        (".ppm", []),
        (".jp2", []),
        (".png", []),
        (".tiff", [cv2.IMWRITE_TIFF_COMPRESSION, 5]),
        (".avif", [cv2.IMWRITE_AVIF_DEPTH, 10]),
        (".avif", [cv2.IMWRITE_AVIF_DEPTH, 12]),
    ],
)
def test_deep_colours_that_pillow_cuts_to_8_bits_raise(tmp_path, ending, options):
    pixels = np.random.default_rng(0).integers(0, 1000, (64, 64, 3)).astype(np.uint16)
    path = tmp_path / "i.png"
    path.write_bytes(cv2.imencode(ending, pixels, options)[1].tobytes())
    for read in (image_io.read_image, image_io.image_size):
        with raises_code("image-depth-unsupported", "i.png"):
            read(path)


# --- Masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("magic", ["P2", "P5"])
@pytest.mark.parametrize("largest", [1, 2, 3, 10, 16, 100, 160, 254, 255, 1000, 16384, 65535])
def test_grey_maps_hold_the_values_of_a_mask(tmp_path, magic, largest):
    values = np.arange(min(largest + 1, 200))[None]
    header = f"{magic} {values.size} 1 {largest}\n".encode()
    if magic == "P2":
        content = " ".join(map(str, values[0])).encode()
    else:
        content = values.astype(">u2" if largest > 255 else "u1").tobytes()
    (tmp_path / "m.png").write_bytes(header + content + b"\n" * (magic == "P2"))
    np.testing.assert_array_equal(image_io.read_mask(tmp_path / "m.png", ALL_VALUES), values)


@pytest.mark.parametrize(
    ("format_", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        *(("TIFF", {"compression": name}) for name in ("raw", "tiff_lzw", "group4")),
    ],
)
def test_an_id_map_may_be_for_0_and_1_or_for_0_and_255(tmp_path, format_, options):
    """The same masks of one bit, with tables for what is stored and for what is shown."""
    classes = np.random.default_rng(0).integers(0, 2, (5, 20)).astype(np.uint8)
    path = tmp_path / "m.png"
    path.write_bytes(saved(Image.fromarray(classes == 1), format_, **options))
    for table in (
        image_io.id_table(2),
        image_io.id_table(2, ignore_ids=(), id_map=((0, 0), (1, 1))),
        image_io.id_table(2, ignore_ids=(), id_map=((0, 0), (255, 1))),
    ):
        np.testing.assert_array_equal(image_io.read_mask(path, table), classes)
        counts, _ = image_io.count_classes(path, table)
        assert counts[1] == classes.sum()
    # Pixels that no entry names are not ignored silently because 255 means that.
    with raises_code("mask-values-unknown", "values 1,"):
        image_io.read_mask(path, image_io.id_table(2, id_map=((0, 0), (7, 1))))


def tiff(values, bits, photometric=1, order="<", fill_order=1, software="", pages=()):
    """Returns an uncompressed grey TIFF of one row, assembled here.

    Args:
        values: the stored values of the row.
        bits: bits per value.
        photometric: 0 if 0 is white, 1 if 0 is black.
        order: "<" for little endian, ">" for big endian.
        fill_order: 1 if the first value of a byte is in its high bits, 2 for the opposite.
        software: the name of the program; "" for none.
        pages: NewSubfileType of each further page; further pages repeat the pixels.
    """
    row = np.packbits(np.unpackbits(values[:, None], axis=1)[:, 8 - bits :])
    if fill_order == 2:
        row = np.packbits(np.unpackbits(row[:, None], axis=1)[:, ::-1])
    name = software.encode() + b"\0"
    content = {"<": b"II*\0", ">": b"MM\0*"}[order]
    row_at, name_at = 8, 8 + row.size
    position = name_at + len(name)
    content += struct.pack(order + "I", position) + row.tobytes() + name
    for number, kind in enumerate((0, *pages)):
        tags = {
            254: kind, 256: values.size, 257: 1, 258: bits, 259: 1, 262: photometric,
            266: fill_order, 273: row_at, 277: 1, 278: 1, 279: row.size,
        }  # fmt: skip
        entries = [struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items()]
        if len(name) > 4:
            entries.append(struct.pack(order + "HHII", 305, 2, len(name), name_at))
        position += 2 + 12 * len(entries) + 4
        following = position if number < len(pages) else 0
        content += struct.pack(order + "H", len(entries)) + b"".join(entries)
        content += struct.pack(order + "I", following)
    return content


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("fill_order", [1, 2])
def test_tiff_masks_hold_the_stored_values(tmp_path, bits, order, fill_order):
    values = np.arange(16, dtype=np.uint8) % min(2**bits, 16)
    path = tmp_path / "m.tif"
    for photometric, software in itertools.product((0, 1), ("", "tifffile.py")):
        if (bits, fill_order, photometric) == (8, 2, 0):  # Pillow cannot decode it.
            continue
        path.write_bytes(tiff(values, bits, photometric, order, fill_order, software))
        read = image_io.read_mask(path, ALL_VALUES)[0]
        # Programs other than tifffile invert the values if 0 is white. They declare that with one
        # bit in facsimiles alone.
        is_inverted = photometric == 0 and not software and bits > 1
        np.testing.assert_array_equal(read, 2**bits - 1 - values if is_inverted else values)
        warnings = file_warnings.find([Example("m", os.fspath(path), os.fspath(path))])
        assert len(warnings) == (photometric == 0 and not software)
        assert all("m.tif" in w and "0 is declared to be white" in w for w in warnings)


@pytest.mark.parametrize("alpha", [1, 2])
def test_a_grey_tiff_with_alpha_is_read(tmp_path, alpha):
    """Alpha is premultiplied (1) or not (2); opaque pixels are the same in both."""
    grey = np.arange(8, dtype=np.uint8)[None]
    content = saved(Image.fromarray(np.dstack([grey, np.full_like(grey, 255)])), "TIFF")
    extra_samples = struct.pack("<HHIHH", 338, 3, 1, 2, 0)
    assert content.count(extra_samples) == 1
    content = content.replace(extra_samples, struct.pack("<HHIHH", 338, 3, 1, alpha, 0))
    (tmp_path / "i.tif").write_bytes(content)
    np.testing.assert_array_equal(image_io.read_image(tmp_path / "i.tif")[..., 0], grey)


def test_pillow_reads_back_masks_that_it_was_told_to_invert(tmp_path):
    mask = Image.fromarray(np.arange(4, dtype=np.uint8)[None])
    bitmap = Image.fromarray(np.array([[True, False, False, True]]))
    for image, compression in ((mask, "raw"), (mask, "tiff_lzw"), (bitmap, "group4")):
        tags = {ExifTags.Base.PhotometricInterpretation: 0}
        image.save(tmp_path / "m.tif", tiffinfo=tags, compression=compression)
        read = image_io.read_mask(tmp_path / "m.tif", ALL_VALUES)
        np.testing.assert_array_equal(read, np.asarray(image))


# --- Formats -------------------------------------------------------------------------------------


def test_a_format_that_is_not_listed_is_not_opened(tmp_path, monkeypatch):
    """All formats that Pillow writes, each under the name of a PNG."""
    Image.init()
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript ran"))
    path = tmp_path / "i.png"
    refused = []
    # Pillow warns that it will drop IM.
    for format_ in sorted(set(Image.SAVE) - {*image_header.FORMATS, "MPO", "IM"}):
        try:
            path.write_bytes(saved(Image.new("RGB", (16, 16)), format_))
        except (OSError, ValueError, KeyError):  # Not a format for RGB, or without a writer here.
            continue
        refused.append(format_)
        for read in READERS:
            with raises_code("image-undecodable", "i.png", "of no known kind"):
                read(path)
    assert {"EPS", "PDF", "ICO"} <= set(refused)


# --- Size ----------------------------------------------------------------------------------------


def test_one_limit_applies_to_every_format_and_reader(tmp_path, limit):
    path = tmp_path / "i.png"
    limit(99)
    written = []
    for format_ in (*image_header.FORMATS, "MPO"):
        try:
            path.write_bytes(saved(Image.new("L", (10, 10)), format_))
        except (OSError, ValueError):
            path.write_bytes(saved(Image.new("RGB", (10, 10)), format_))
        except KeyError:  # Pillow reads the format and does not write it.
            continue
        written.append(format_)
        limit(99)
        for read in READERS:
            with raises_code("image-too-large", "i.png is 10x10", "99 pixels", "max_image_pixels"):
                read(path)
        limit(100)
        assert image_io.read_image(path).shape == (10, 10, 3)
    assert len(written) >= 13


def test_a_small_file_of_many_pixels_is_refused_by_its_header(tmp_path):
    # A PNG of one pixel in whose header the size is replaced.
    content = bytearray(saved(Image.new("1", (1, 1)), "PNG"))
    content[16:24] = struct.pack(">II", 22_000, 22_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "i.png").write_bytes(content)
    for read in READERS:
        with raises_code("image-too-large", "22000x22000"):
            read(tmp_path / "i.png")


# --- What is no file -----------------------------------------------------------------------------


def special_files(folder):
    """Yields a named pipe, a socket, a link to a device, and a link to the pipe."""
    os.mkfifo(folder / "pipe.png")
    yield folder / "pipe.png"
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(os.fspath(folder / "socket.png"))
        yield folder / "socket.png"
    for target in ("/dev/zero", folder / "pipe.png"):
        link = folder / f"to_{os.path.basename(target)}"
        link.symlink_to(target)
        yield link


def test_pipes_sockets_and_devices_are_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # The path of a socket has at most 107 bytes.
    for path in special_files(tmp_path.relative_to(tmp_path)):
        for read in READERS:
            with raises_code("image-not-a-file", path.name):
                read(path)
        assert file_warnings.find([Example("i", os.fspath(path), os.fspath(path))]) == []


# --- Pages and frames ----------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_further_frames_are_said(tmp_path, format_):
    frames = [Image.new("RGB", (16, 16), (60 * i, 0, 0)) for i in range(3)]
    examples = []
    for count in (1, 2, 3):
        path = tmp_path / f"{count}.png"
        more = {"save_all": True, "append_images": frames[1:count]} if count > 1 else {}
        path.write_bytes(
            saved(frames[0], "JPEG" if (format_, count) == ("MPO", 1) else format_, **more)
        )
        examples.append(Example(str(count), os.fspath(path), None))
        assert image_io.read_image(path)[..., 1].max() <= 2  # The first frame is read.
    assert file_warnings.find(examples[:1]) == []
    (sentence,) = file_warnings.find(examples)
    assert sentence.startswith(f"2 files ({tmp_path}/2.png first) hold several pages or frames")
    (sentence,) = file_warnings.find(examples[2:])
    assert sentence.startswith(f"{tmp_path}/3.png holds several pages or frames")


@pytest.mark.parametrize(
    ("pages", "is_said"),
    [((), False), ((1,), False), ((1, 1, 4), False), ((0,), True), ((1, 0), True), ((2,), True)],
)
def test_overviews_and_masks_of_a_tiff_are_no_further_pages(tmp_path, pages, is_said):
    path = tmp_path / "i.tif"
    path.write_bytes(tiff(np.arange(8, dtype=np.uint8), 8, pages=pages))
    assert bool(file_warnings.find([Example("i", os.fspath(path), None)])) == is_said
    assert image_io.read_image(path)[0, :, 0].tolist() == list(range(8))


def test_a_page_of_a_form_that_cannot_be_decoded_is_a_further_page(tmp_path):
    content = bytearray(tiff(np.arange(8, dtype=np.uint8), 8, pages=(0,)))
    bits = struct.pack("<HHII", 258, 4, 1, 8)
    second = content.rindex(bits)
    content[second : second + 12] = struct.pack("<HHII", 258, 4, 1, 7)
    (tmp_path / "i.tif").write_bytes(content)
    assert len(file_warnings.find([Example("i", os.fspath(tmp_path / "i.tif"), None)])) == 1


def test_pages_that_form_a_cycle_end(tmp_path):
    content = bytearray(tiff(np.arange(8, dtype=np.uint8), 8, pages=(1,)))
    content[-4:] = content[4:8]  # The page after the last is the first.
    (tmp_path / "i.tif").write_bytes(content)
    assert file_warnings.find([Example("i", os.fspath(tmp_path / "i.tif"), None)]) == []


# --- EXIF orientation of image and mask ----------------------------------------------------------


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_an_orientation_that_sizes_do_not_settle_is_said(tmp_path, format_, size):
    examples, unsure = [], []
    for image_orientation, mask_orientation in itertools.product(range(1, 9), repeat=2):
        id_ = f"{image_orientation}{mask_orientation}"
        paths = []
        for kind, orientation in (("i", image_orientation), ("m", mask_orientation)):
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            # Stored so that all are upright at the same size.
            stored = size[::-1] if orientation >= 5 else size
            path = tmp_path / f"{kind}{id_}.png"
            path.write_bytes(saved(Image.new("L", stored), format_, exif=exif))
            paths.append(os.fspath(path))
        examples.append(Example(id_, *paths))
        is_one = (image_orientation == 1) != (mask_orientation == 1)
        if is_one and (size[0] == size[1] or max(image_orientation, mask_orientation) < 5):
            unsure.append(paths[0])
    (sentence,) = file_warnings.find(examples)
    assert sentence.startswith(
        f"{len(unsure)} images ({unsure[0]} first) carry an EXIF orientation"
    )
    for example in examples:
        assert bool(file_warnings.find([example])) == (example.image in unsure)
