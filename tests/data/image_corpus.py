"""Small image files of every format, pixel format, compression and width, as programs write them.

Nothing is listed file by file: each generator tries all combinations and leaves out those that
the program itself refuses to write.
"""

import dataclasses
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from semiseg_jax.data import image_io
from semiseg_jax.runtime.errors import UserError

# Bytes of a row, offsets and rows of tiles then contain all kinds of numbers, "16" among them.
WIDTHS = (1, 2, 5, 16, 54, 161, 540, 720)
HEIGHT = 3

# What Pillow writes of each format: its name, the modes to try, and the options of each file.
_PILLOW_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")
_TIFF_COMPRESSIONS = (
    *("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd"),
    *("group3", "group4", "tiff_ccitt"),
)
_PILLOW_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "PNG": ({}, {"compress_level": 0}, {"optimize": True}, {"bits": 1}, {"bits": 2}, {"bits": 4}),
    "TIFF": tuple(
        {"compression": compression, "big_tiff": big}
        for compression, big in itertools.product(_TIFF_COMPRESSIONS, (False, True))
    ),
    "BMP": ({},),
    "DIB": ({},),
    "WEBP": ({"lossless": True, "exact": True},),
    "GIF": ({}, {"interlace": 1}),
    "PPM": ({},),
    "JPEG2000": ({}, {"no_jp2": True}),
    "TGA": ({}, {"compression": "tga_rle"}),
    "PCX": ({},),
    "SGI": ({},),
    "QOI": ({},),
    "AVIF": ({},),
    "JPEG": ({}, {"subsampling": 0}, {"progressive": True}),
    "MPO": ({},),
}
# Formats, and modes in other formats, that change the pixels when they are written.
_LOSSY_FORMATS = frozenset({"AVIF", "JPEG", "MPO", "GIF"})
_LOSSY_MODES = frozenset({"TIFF YCbCr", "JPEG2000 YCbCr", "JPEG2000 CMYK"})

# What OpenCV writes, by the ending.
_OPENCV_ENDINGS = (
    *(".png", ".bmp", ".tiff", ".jpg", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
    *(".gif", ".ras"),
)
# These formats lose the alpha of a fourth channel.
_OPENCV_WITHOUT_ALPHA = frozenset({".gif", ".ras"})
_OPENCV_MASKS = frozenset({".png", ".bmp", ".tiff", ".pgm", ".pnm", ".jp2", ".ras"})
_OPENCV_OPTIONS: dict[str, tuple[list[int], ...]] = {
    ".tiff": tuple([cv2.IMWRITE_TIFF_COMPRESSION, number] for number in (1, 5, 8, 32773, 32946)),
    ".png": ([], [cv2.IMWRITE_PNG_BILEVEL, 1]),
    ".webp": ([cv2.IMWRITE_WEBP_QUALITY, 101],),
}


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """A file and what is in it.

    Attributes:
        name: program, format and options.
        content: the bytes of the file.
        rgb: the pixels [h, w, 3] that were written or, of a lossy format, the writer's own
            decoding; None if they have more than 8 bits.
        values: the values [h, w] that a mask of this form holds; None if it is no grey or palette
            image.
    """

    name: str
    content: bytes
    rgb: np.ndarray | None
    values: np.ndarray | None = None


def by_pillow(widths: tuple[int, ...] = WIDTHS) -> Iterator[CorpusFile]:
    """Yields the files that Pillow writes."""
    for format_, mode, width in itertools.product(_PILLOW_OPTIONS, _PILLOW_MODES, widths):
        for options in _PILLOW_OPTIONS[format_]:
            if ("bits" in options and mode != "P") or (_is_fax(options) and mode != "1"):
                continue
            source = _pillow_image(mode, width, 2 ** options.get("bits", 8))
            buffer = io.BytesIO()
            try:
                source.save(buffer, format_, **options)
            except (OSError, ValueError, KeyError):  # Not a combination that Pillow writes.
                continue
            written = Image.open(io.BytesIO(buffer.getvalue()))
            is_lossy = format_ in _LOSSY_FORMATS or f"{format_} {mode}" in _LOSSY_MODES
            written.load()
            image = written if is_lossy else source
            is_deep = written.mode.startswith(("I", "F"))
            is_mask = written.mode in ("P", "I;16") or (mode in ("1", "L") and not is_lossy)
            yield CorpusFile(
                f"pillow {format_} {mode} {width} {options}",
                buffer.getvalue(),
                None if is_deep else np.asarray(image.convert("RGB")),
                np.asarray(image, np.uint8) if is_mask and written.mode != "RGB" else None,
            )


def _is_fax(options: dict[str, Any]) -> bool:
    return options.get("compression") in ("group3", "group4", "tiff_ccitt")


def _pillow_image(mode: str, width: int, levels: int) -> Image.Image:
    generator = np.random.default_rng(width)
    grey = generator.integers(0, levels, (HEIGHT, width)).astype(np.uint8)
    if mode == "1":
        return Image.fromarray(grey % 2 == 1)
    if mode == "P":
        image = Image.fromarray(grey)
        image.putpalette(generator.integers(0, 256, (levels, 3)).astype(np.uint8).tobytes())
        return image
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16))
    if mode in ("L", "I", "F"):
        return Image.fromarray(grey).convert(mode)
    channels = len(Image.new(mode, (1, 1)).getbands())
    colours = generator.integers(0, 256, (HEIGHT, width, channels)).astype(np.uint8)
    return Image.frombytes(mode, (width, HEIGHT), colours.tobytes())


def by_opencv(widths: tuple[int, ...] = WIDTHS) -> Iterator[CorpusFile]:
    """Yields the files that OpenCV writes."""
    for ending, dtype, channels, width in itertools.product(
        _OPENCV_ENDINGS, (np.uint8, np.uint16), (1, 3, 4), widths
    ):
        if channels == 4 and ending in _OPENCV_WITHOUT_ALPHA:
            continue
        shape = (HEIGHT, width) if channels == 1 else (HEIGHT, width, channels)
        array = np.random.default_rng(width).integers(0, 256, shape).astype(dtype)
        for options in _OPENCV_OPTIONS.get(ending, ([],)):
            try:
                _, encoded = cv2.imencode(ending, array, options)
                content = encoded.tobytes()
                decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR_BGR | cv2.IMREAD_ANYDEPTH)
            except (cv2.error, AttributeError):  # Not a combination that OpenCV writes.
                continue
            if decoded is None:
                continue
            is_deep = decoded.dtype != np.uint8
            values = array if channels == 1 and ending in _OPENCV_MASKS else None
            if cv2.IMWRITE_PNG_BILEVEL in options or ending == ".pbm":
                values = None
            yield CorpusFile(
                f"opencv {ending} {np.dtype(dtype).name} {channels} {width} {options}",
                content,
                None if is_deep else np.ascontiguousarray(decoded[..., ::-1]),
                values,
            )


def by_tifffile(widths: tuple[int, ...] = (1, 16, 161, 540)) -> Iterator[CorpusFile]:
    """Yields the TIFF files that tifffile writes."""
    import tifffile

    compressions = [None, "lzw", "adobe_deflate", "packbits", "zstd"]
    # Pillow cannot read BigTIFF in big-endian order.
    kinds = (("<", False), (">", False), ("<", True))
    for photometric, dtype, width, compression, (byteorder, bigtiff), layout in itertools.product(
        ("minisblack", "miniswhite", "rgb", "rgba", "palette"),
        (bool, np.uint8, np.uint16),
        widths,
        compressions,
        kinds,
        ({}, {"tile": (16, 16)}, {"rowsperstrip": 1}, {"planarconfig": "separate"}),
    ):
        is_colour = photometric in ("rgb", "rgba")
        if (layout.get("planarconfig") and not is_colour) or (dtype is bool and is_colour):
            continue
        if photometric == "miniswhite" and dtype is np.uint16:  # Pillow has no such mode.
            continue
        channels = {"rgb": (3,), "rgba": (4,)}.get(photometric, ())
        generator = np.random.default_rng(width)
        array = generator.integers(0, 2 if dtype is bool else 256, (HEIGHT, width, *channels))
        array = array.astype(dtype)
        options: dict[str, Any] = {"photometric": photometric.removesuffix("a"), **layout}
        palette = generator.integers(0, 256, (3, 256)).astype(np.uint8)
        if photometric == "palette":
            options["colormap"] = palette.astype(np.uint16) * 257
        if photometric == "rgba":
            options["extrasamples"] = ["unassalpha"]
        stored = np.moveaxis(array, -1, 0) if layout.get("planarconfig") else array
        buffer = io.BytesIO()
        try:
            tifffile.imwrite(
                buffer,
                stored,
                compression=compression,
                byteorder=byteorder,
                bigtiff=bigtiff,
                **options,
            )
        except Exception:  # Not a combination that tifffile writes.
            continue
        yield CorpusFile(
            f"tifffile {photometric} {np.dtype(dtype).name} {width} {compression} {byteorder} "
            f"{'big' if bigtiff else 'classic'} {layout}",
            buffer.getvalue(),
            None if dtype is np.uint16 else _shown(array, photometric, palette),
            None if is_colour else array,
        )


def _shown(array: np.ndarray, photometric: str, palette: np.ndarray) -> np.ndarray:
    """Returns the RGB pixels that a TIFF of these values shows."""
    if photometric in ("rgb", "rgba"):
        return array[..., :3]
    if photometric == "palette":
        return palette.T[array.astype(np.uint8)]
    grey = array.astype(np.uint8) * (255 if array.dtype == bool else 1)
    return np.stack([255 - grey if photometric == "miniswhite" else grey] * 3, -1)


def check(files: Iterable[CorpusFile], path: Path) -> None:
    """Checks that every file is read to the pixel, as image and as mask.

    Args:
        files: the files.
        path: where each is written for a moment.
    """
    every_value = np.arange(256, dtype=np.int16)
    wrong = []
    for file in files:
        path.write_bytes(file.content)
        try:
            height, width = image_io.image_size(path)
            rgb = image_io.read_image(path)
            is_right = file.rgb is not None and np.array_equal(rgb, file.rgb)
            is_right &= (height, width) == rgb.shape[:2]
        except UserError as error:
            is_right = file.rgb is None and error.code == "image-depth-unsupported"
        if file.values is not None:
            try:
                is_right &= np.array_equal(image_io.read_mask(path, every_value), file.values)
            except UserError:
                is_right = False
        if not is_right:
            wrong.append(file.name)
    assert not wrong, f"{len(wrong)} files, such as {wrong[:5]}"
