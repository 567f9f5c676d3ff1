"""Opens image files and reads their headers; `image_io` decodes the pixels.

This module alone decides which files and formats are opened, the largest size that is decoded, and
which pixel formats have too many bits.
"""

import os
import re
import stat
from collections.abc import Sequence
from typing import Any

from etils import epath
from PIL import ExifTags, Image

from semiseg_jax.runtime.errors import UserError

# The formats that are read, by content and not by the ending of the name. Each is decoded inside
# this process. Pillow would hand EPS to Ghostscript, which runs programs that the file contains.
# Pillow's JPEG also opens MPO, the JPEGs with several pictures that phones write.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF"),
    *("TGA", "PCX", "SGI", "SUN", "QOI"),
)

# Default of `data.max_image_pixels`. Decoding takes about 10 bytes a pixel: 2.7 GB for this many.
DEFAULT_MAX_PIXELS = 2**28

# The limit of this process. Images are decoded by many functions in several threads, and one limit
# applies to all of them.
_max_pixels = DEFAULT_MAX_PIXELS

# `ImageFile` compares sizes with the limit above.
Image.MAX_IMAGE_PIXELS = None


def set_max_pixels(count: int) -> None:
    """Sets the largest number of pixels of an image or mask that this process decodes."""
    global _max_pixels
    _max_pixels = count


def check_num_pixels(path: epath.PathLike, sides: Sequence[int]) -> None:
    """Raises a UserError for an image of these sides that has more pixels than are decoded."""
    width, height = sides
    if width * height > _max_pixels:
        raise UserError(
            f"{path} is {width}x{height} by its header, more than the {_max_pixels:,} pixels "
            "that are decoded: cut it into parts or, if it is no damage, raise "
            "data.max_image_pixels (in predict, export and convert --max_image_pixels).",
            code="image-too-large",
        )


# The operation that turns an image upright, by its EXIF orientation. Pillow's exif_transpose also
# rewrites the EXIF data, which fails if an unrelated tag is malformed.
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Compressions of TIFF for facsimile, with which 0 is usually white.
_FAX_COMPRESSIONS = (2, 3, 4, 32771)
# Bits of TIFF's NewSubfileType: the page is a smaller version of another page, or its mask.
_REDUCED_OR_MASK = 0b101
# Sides are halved from overview to overview, so that no image has so many.
_MAX_OVERVIEWS = 64


class ImageFile:
    """An opened image file whose header is read; the image is upright by its EXIF orientation.

    Attributes:
        image: Pillow's image, not decoded before `decode`.
        raw_mode: the file's pixel format, such as "RGB;16B".
        orientation: the EXIF orientation 1..8; from 5 on, the sides of the stored image are
            swapped.
    """

    def __init__(self, path: epath.PathLike, stream: Any):
        """Reads the header.

        Args:
            path: path of the file, for messages.
            stream: the opened file.

        Raises:
            UserError: the image has too many pixels.
            Exception: one of many types, if the file is damaged or of another format.
        """
        self.image = Image.open(stream, formats=FORMATS)
        self._stream = stream
        self.raw_mode, self._scale = _pixel_format(self.image)
        self.orientation = _exif_orientation(self.image)
        check_num_pixels(path, self.image.size)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright image in pixels."""
        width, height = self.image.size
        is_swapped = self.orientation >= 5 and self.image.format != "TIFF"
        return (width, height) if is_swapped else (height, width)

    @property
    def has_more_than_8_bits(self) -> bool:
        """Whether a channel has more than 256 levels; Pillow cuts some such files to 8 bits."""
        if self.image.mode.startswith(("I", "F")):
            return True
        match self.image.format:
            case "TIFF":
                return max(_tiff_tag(self.image, ExifTags.Base.BitsPerSample, (1,))) > 8
            case "PPM":
                return self._scale is not None and self._scale[0] > 255
            case "JPEG2000":
                return _jpeg2000_bits(self._read_start()) > 8
            case "AVIF":
                return _avif_has_more_than_8_bits(self._read_start())
        # "RGB;16B" has 16 bits a channel; "BGR;16" has 16 bits a pixel.
        return re.search(r";16[BLNS]", self.raw_mode) is not None

    @property
    def grey_scale(self) -> tuple[int, int] | None:
        """(largest value in the file, the value that Pillow makes of it); None if they are equal.

        Pillow spreads grey values of less than 8 bits over 0..255.
        """
        return self._scale

    @property
    def shows_zero_as_white(self) -> bool:
        """Whether the file is a grey TIFF whose stored values Pillow inverts."""
        return (
            self.image.format == "TIFF"
            and self.image.mode in ("1", "L")
            and _tiff_tag(self.image, ExifTags.Base.PhotometricInterpretation, 0) == 0
        )

    @property
    def is_by_tifffile(self) -> bool:
        """Whether a TIFF says that tifffile wrote it, as scikit-image and imageio do too."""
        software = str(_tiff_tag(self.image, ExifTags.Base.Software, ""))
        description = str(_tiff_tag(self.image, ExifTags.Base.ImageDescription, ""))
        return software.startswith("tifffile") or description.startswith('{"shape":')

    @property
    def inverts_stored_values(self) -> bool:
        """Whether Pillow's grey values are the inverse of what the writer of the mask stored.

        tifffile stores arrays as they are and declares 0 to be white for boolean ones. Programs
        for pictures, such as Pillow, invert the values where they declare that, which for 1 bit
        they do with the compressions of facsimile alone.
        """
        if not self.shows_zero_as_white:
            return False
        compression = _tiff_tag(self.image, ExifTags.Base.Compression, 1)
        is_bare_bitmap = self.image.mode == "1" and compression not in _FAX_COMPRESSIONS
        return self.is_by_tifffile or is_bare_bitmap

    @property
    def has_further_frames(self) -> bool:
        """Whether the file holds other pictures than the first; overviews of it do not count.

        The image may have to be opened again before it is decoded.
        """
        if self.image.format != "TIFF":
            return bool(getattr(self.image, "is_animated", False))
        # Ends at the first page of full size, and Pillow ends cycles of pages.
        image: Any = self.image
        for _ in range(_MAX_OVERVIEWS):
            if not image.tag_v2.next:
                return False
            try:
                image.seek(image.tell() + 1)
            except EOFError:  # A cycle.
                return False
            except Exception:  # A page that Pillow cannot decode. Its tags are read.
                return not _tiff_tag(image, ExifTags.Base.NewSubfileType, 0) & _REDUCED_OR_MASK
            if not _tiff_tag(image, ExifTags.Base.NewSubfileType, 0) & _REDUCED_OR_MASK:
                return True
        return True

    def decode(self) -> Image.Image:
        """Returns the decoded, upright image."""
        self.image.load()
        if self.image.format == "TIFF":  # Pillow has turned it.
            return self.image
        return turn_upright(self.image, self.orientation)

    def _read_start(self) -> bytes:
        """Returns the first bytes of the file, and leaves the stream where it was."""
        position = self._stream.tell()
        self._stream.seek(0)
        start = self._stream.read(2**16)
        self._stream.seek(position)
        return start


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Returns a stored image as it is upright by an EXIF orientation 1..8."""
    transpose = _TRANSPOSE_BY_ORIENTATION.get(orientation)
    return image if transpose is None else image.transpose(transpose)


def format_of(path: epath.PathLike) -> str | None:
    """Returns the format of an image that has been decoded before, such as "PNG"."""
    with epath.Path(path).open("rb") as stream:
        return Image.open(stream, formats=FORMATS).format


def check_regular(path: epath.PathLike) -> None:
    """Raises a UserError for a pipe, socket or device, which may never end or never begin.

    Every function that opens a file of a folder of images calls this first.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # Missing, or in a store such as gs://: opening it says so.
        return
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    raise UserError(
        f"{path} is a {kinds.get(stat.S_IFMT(mode), 'device')} and not a file, and was not "
        "opened: replace it, or take it out of the folder or list.",
        code="image-not-a-file",
    )


def _pixel_format(image: Any) -> tuple[str, tuple[int, int] | None]:
    """Returns the file's pixel format and `ImageFile.grey_scale` of an undecoded image."""
    # The arguments of Pillow's decoders: the pixel format or, in a tuple, first the pixel format
    # and then numbers such as the bytes of a row or an offset in the file.
    arguments = image.tile[0].args if image.tile else image.mode
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    raw_mode = first if isinstance(first, str) else image.mode
    if image.format == "PPM" and isinstance(arguments, tuple) and image.mode != "F":
        largest, shown = int(arguments[1]), 65535 if image.mode == "I" else 255
    elif image.mode == "1":
        largest, shown = 1, 255
    elif match := re.match(r"L;([24])", raw_mode):
        largest, shown = 2 ** int(match[1]) - 1, 255
    else:
        return raw_mode, None
    return raw_mode, (largest, shown) if largest != shown else None


def _tiff_tag(image: Any, tag: int, default: Any) -> Any:
    """Returns a tag of the current page; `default` if the image is no TIFF or has no such tag."""
    return image.tag_v2.get(tag, default) if image.format == "TIFF" else default


def _exif_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation 1..8 of an undecoded image.

    In a PNG only chunks before the pixels count, because Pillow would decode the whole image to
    read the chunks after them.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many types of exception for damaged EXIF data.
        return 1  # The pixels may still be sound.
    return orientation if orientation in range(1, 9) else 1


def _jpeg2000_bits(start: bytes) -> int:
    """Returns the bits of the deepest channel, from the SIZ segment of the code stream."""
    marker = start.find(b"\xff\x4f\xff\x51")
    if marker < 0:
        return 8
    channels = int.from_bytes(start[marker + 40 : marker + 42])
    depths = start[marker + 42 : marker + 42 + 3 * channels : 3]
    return max(((depth & 0x7F) + 1 for depth in depths), default=8)


def _avif_has_more_than_8_bits(start: bytes) -> bool:
    """Returns the flag `high_bitdepth` of the configuration of the AV1 codec."""
    box = start.find(b"av1C")
    return box >= 0 and bool(start[box + 6 : box + 7]) and bool(start[box + 6] & 0x40)
