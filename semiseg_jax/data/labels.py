"""Images and label maps on disk: read exactly, written atomically.

A label map is a PNG whose palette indices (or grey levels) are class ids. Pillow decodes both
kinds of file everywhere in the project, so that training, labelling, evaluation and prediction
see the same pixels.
"""

import contextlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from etils import epath
from jaxtyping import Int, Int16, UInt8
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from semiseg_jax import distributed
from semiseg_jax.errors import UserError, first_line, unread, unwritten

IGNORE = 255
# Large images are data here, not an attack.
Image.MAX_IMAGE_PIXELS = None

# In an id table: a mask value that the data set does not have.
UNKNOWN = -1


def id_table(
    num_classes: int,
    ignore_ids: Sequence[int] = (IGNORE,),
    id_map: Sequence[Any] = (),
) -> Int16[np.ndarray, "256"]:
    """Table from mask value to class id, IGNORE or UNKNOWN.

    Args:
        num_classes: class ids are 0 … num_classes - 1.
        ignore_ids: mask values that become IGNORE.
        id_map: (mask value, class id) pairs; empty where the values are the class ids.

    Raises:
        UserError: a mask value is not 0..255, a class id not below `num_classes`, or a value
            both a class and ignored.
    """
    try:
        pairs = [(int(value), int(class_id)) for value, class_id in id_map]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data.id_map is {id_map!r}: make it ((mask value, class id), …)."
        ) from error
    allowed = {*range(num_classes), IGNORE}
    for value, class_id in (*pairs, *((value, IGNORE) for value in ignore_ids)):
        if value not in range(256) or class_id not in allowed:
            raise UserError(
                f"data.id_map or data.ignore_ids makes mask value {value} class {class_id}: mask "
                f"values are 0 to 255 and class ids 0 to {num_classes - 1}."
            )
    both = sorted({value for value, class_id in pairs if class_id != IGNORE} & {*ignore_ids})
    if both:
        raise UserError(
            f"data.id_map gives mask value {both[0]} a class, and data.ignore_ids ignores it: take "
            "it out of one of them."
        )
    table = np.full(256, UNKNOWN, np.int16)
    if id_map:
        for value, class_id in pairs:
            table[value] = class_id
    else:
        table[:num_classes] = np.arange(num_classes)
    table[list(ignore_ids)] = IGNORE
    return table


class _File:
    """An image file, its header read; stands upright as its EXIF orientation says.

    Attributes:
        image: Pillow's, not decoded before `decode`.
        raw_mode: how the file keeps its pixels, such as "RGB;16B".
    """

    def __init__(self, file: Any):
        self.image = Image.open(file)
        tiles = self.image.tile
        self.raw_mode = str(tiles[0].args) if tiles else self.image.mode
        self._orientation = _orientation(self.image)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, upright."""
        width, height = self.image.size
        return (width, height) if self._orientation >= 5 else (height, width)

    @property
    def has_more_than_8_bits(self) -> bool:
        """A channel has more than 256 levels; Pillow would cut some of these to 8 bits silently."""
        return self.image.mode.startswith(("I", "F")) or "16" in self.raw_mode

    def decode(self) -> Image.Image:
        """The upright image."""
        self.image.load()
        turn = _TURNS.get(self._orientation)
        return self.image if turn is None else self.image.transpose(turn)


# What shows an image upright, by its orientation. Not Pillow's exif_transpose, which also writes
# the EXIF anew, and fails where a tag that nobody asked for is malformed.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 of an image that is not decoded yet; from 5 on its sides are swapped.

    Not for TIFF, which Pillow turns by itself. Of a PNG only what stands before the pixels is
    looked at: Pillow would decode it all to look behind them.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow has as many as there are kinds of damage.
        return 1  # damaged EXIF beside sound pixels
    return orientation if orientation in range(1, 9) else 1


@contextlib.contextmanager
def _opening(path: epath.PathLike, refusal: str) -> Iterator[None]:
    """What goes wrong with an image file is one sentence; in `refusal`, {} stands for why."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: restore it or take it out of its list.") from error
    except PermissionError as error:
        raise unread(path, error, "make it readable, or take it out of its list") from error
    except Exception as error:  # Pillow's decoders have many, down to TypeError and OverflowError.
        why = first_line(error)
        if isinstance(error, UnidentifiedImageError):  # it names the Python object that was read
            why = "of no known kind" if epath.Path(path).stat().length else "the file is empty"
        raise UserError(f"{path} {refusal.format(why)}") from error


def _open(path: epath.PathLike) -> tuple[_File, Image.Image]:
    """The file and its decoded image; a damaged or missing file is one sentence."""
    refusal = (
        "cannot be decoded ({}): it is truncated, corrupt or not an image; replace it or take it "
        "out of its list."
    )
    with _opening(path, refusal):
        file = _File(io.BytesIO(epath.Path(path).read_bytes()))
        return file, file.decode()


def image_size(path: epath.PathLike) -> tuple[int, int]:
    """(height, width) in pixels of the upright image, from the file's header alone.

    Raises:
        UserError: the file is missing, not an image, or has more than 8 bits a channel.
    """
    refusal = "is not an image ({}): replace it or take it out of its list."
    with _opening(path, refusal), epath.Path(path).open("rb") as stream:
        file = _File(stream)
    _refuse_deep(path, file)
    return file.size


def _refuse_deep(path: epath.PathLike, file: _File) -> None:
    if file.has_more_than_8_bits:
        raise UserError(
            f"{path} has more than 8 bits a channel (mode {file.raw_mode}): convert it to 8 bits, "
            "with the range that suits your images."
        )


def read_image(path: epath.PathLike) -> UInt8[np.ndarray, "h w 3"]:
    """RGB image, upright, whatever the file's mode: grey is repeated, transparency dropped.

    Raises:
        UserError: the file is missing, damaged, or of a mode with more than 8 bits a channel.
    """
    file, image = _open(path)
    _refuse_deep(path, file)
    return np.asarray(image.convert("RGB"))


# What Pillow multiplies the values of grey images of less than 8 bits by.
_STRETCHED = {"1": 255, "L;2": 85, "L;4": 17}


def _read_values(path: epath.PathLike) -> UInt8[np.ndarray, "h w"]:
    """A mask's values as they stand in the file: palette indices or grey levels."""
    file, image = _open(path)
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    # Signed in some TIFF files: cut to 8 bits, -1 would be IGNORE.
    if image.mode.startswith("I") and 0 <= values.min(initial=0) <= values.max(initial=0) < 256:
        values = values.astype(np.uint8)
    elif image.mode not in ("1", "L", "P"):
        raise UserError(
            f"{path} holds colours or values outside 0 to 255 (mode {image.mode}) where class "
            "ids are expected: save masks as palette or grey PNGs whose values are the class ids."
        )
    factor = _STRETCHED.get(file.raw_mode)
    return values // factor if factor else values


def read_mask(path: epath.PathLike, table: Int16[np.ndarray, "256"]) -> UInt8[np.ndarray, "h w"]:
    """Label map: class ids, and IGNORE.

    Args:
        path: a palette or grey PNG; palette indices are taken, not colours.
        table: from `id_table`.

    Raises:
        UserError: the file is missing or damaged, holds colours instead of indices, or a value
            that is neither a class nor ignored.
    """
    values = _read_values(path)
    if (table == UNKNOWN).any():
        _refuse_unknown(path, _counts(values), table)
    return table.astype(np.uint8)[values]


def count_classes(
    path: epath.PathLike, table: Int16[np.ndarray, "256"]
) -> tuple[Int[np.ndarray, "256"], tuple[int, int]]:
    """Pixels of each class id and of IGNORE in a label map, and its (height, width).

    Raises:
        UserError: as `read_mask`.
    """
    values = _read_values(path)
    by_value = _counts(values)
    _refuse_unknown(path, by_value, table)
    by_class = np.zeros(256, np.int64)
    np.add.at(by_class, table.astype(np.uint8), by_value)
    return by_class, values.shape


def _counts(values: UInt8[np.ndarray, "h w"]) -> Int[np.ndarray, "256"]:
    # Pillow counts bytes several times faster than NumPy.
    return np.array(Image.fromarray(values).histogram())


def _refuse_unknown(
    path: epath.PathLike, counts: Int[np.ndarray, "256"], table: Int16[np.ndarray, "256"]
) -> None:
    present = np.flatnonzero(counts)
    unknown = present[table[present] == UNKNOWN]
    if not len(unknown):
        return
    named = ", ".join(map(str, unknown[:8])) + (", …" if len(unknown) > 8 else "")
    hint = ""
    if IGNORE in unknown and len(present) <= 2:
        hint = " (a 0/255 mask: map 255 to class 1 with data.id_map=((0,0),(255,1)))"
    raise UserError(
        f"{path} holds the values {named}, which are neither a class nor ignored: give them "
        f"in data.id_map or data.ignore_ids{hint}."
    )


def encode_mask(
    mask: UInt8[np.ndarray, "h w"],
    palette: Sequence[Sequence[int]],
    text: dict[str, str] | None = None,
) -> bytes:
    """A palette PNG of the label map; `text` goes into its text chunks."""
    image = Image.fromarray(mask)
    image.putpalette(full_palette(palette).tobytes())
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    buffer = io.BytesIO()
    # bits=8: Pillow would pack few classes into fewer bits, which some readers scale. Label maps
    # are runs of one value: looking for these alone takes a quarter of the time, for files that are
    # a quarter larger.
    runs: Any = {"bits": 8, "compress_type": zlib.Z_RLE}
    image.save(buffer, "PNG", pnginfo=chunks, **runs)
    return buffer.getvalue()


def read_text(path: epath.PathLike) -> dict[str, str]:
    """The text chunks of a label map written by `encode_mask`, the image decoded on the way.

    Raises:
        UserError: the file is missing or damaged.
    """
    _, image = _open(path)
    return {str(k): v for k, v in image.info.items() if isinstance(v, str)}


def full_palette(palette: Sequence[Sequence[int]]) -> UInt8[np.ndarray, "256 3"]:
    """`palette` with white for IGNORE and black between."""
    full = np.zeros((256, 3), np.uint8)
    full[: len(palette)] = palette
    full[IGNORE] = 255
    return full


def generated_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """Distinct colours by spreading the bits of the class id over the channels.

    Source: the colour map of the PASCAL VOC development kit.
    """
    colours = []
    for class_id in range(num_classes):
        rest, colour = class_id, [0, 0, 0]
        for shift in range(7, -1, -1):
            for channel in range(3):
                colour[channel] |= ((rest >> channel) & 1) << shift
            rest >>= 3
        colours.append((colour[0], colour[1], colour[2]))
    return tuple(colours)


def has_rename(path: epath.PathLike) -> bool:
    """Whether a file can be renamed there, at once: on file systems, not in stores such as gs://.

    Such stores copy and delete instead, which may end halfway.
    """
    return "://" not in os.fspath(path)


def write_bytes(path: epath.PathLike, content: bytes, sync: bool = True) -> None:
    """Writes a file so that it is never seen half-written: temporary name, then rename.

    Stores without rename (see `has_rename`) show a file only once all of it was written, and get
    it under its own name.

    Args:
        path: of the file.
        content: of the file.
        sync: wait until the disk has it, so that a power cut leaves the old file or the new one.
            Not for files by the thousand, for which that takes longer than making them. A power
            cut may leave these empty or cut off, and whoever reads them has to find out: label
            maps are known by their stamp and hash, and made again.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        if has_rename(path):
            _write_and_rename(os.fspath(path), content, sync)
        else:
            target = epath.Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    except OSError as error:
        raise unwritten(path, error) from error


# The names of temporary files, and whose they are.
_TEMPORARY = re.compile(r"\..+\.\d+-(?P<process>\d{1,9})\.tmp")


def _write_and_rename(path: str, content: bytes, sync: bool) -> None:
    """Writes a file of a file system.

    Few system calls, and no objects for paths: prediction and labelling write small files by the
    thousand, and with epath each takes twice the time.
    """
    folder, name = os.path.split(path)
    # On a shared file system processes of several machines may have one number.
    maker = f"{distributed.index()}-{os.getpid()}"
    temporary = os.path.join(folder, f".{name}.{maker}.tmp")  # as _TEMPORARY has it
    try:
        with _made(temporary) as file:
            file.write(content)
            if sync:
                # Else the rename may reach the disk before what it renames.
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if sync:
        _sync_folder(folder or ".")


def _sync_folder(folder: str) -> None:
    """Waits until the disk has the names of a folder, where its file system can be asked to."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _made(path: str) -> BinaryIO:
    """A new file, open for writing; so is its folder, where it is missing."""
    try:
        return open(path, "wb")
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, "wb")


def remove_leftovers(folder: epath.PathLike) -> None:
    """Removes the temporary files below a folder that `write_bytes` left when it was killed.

    Links to folders are not followed: what lies there is not ours. What another process of this
    machine may be about to rename stays.
    """
    if not has_rename(folder):
        return  # None are made there.
    for place, _, names in os.walk(folder):
        for name in names:
            made = _TEMPORARY.fullmatch(name)
            if made and not _is_another_alive(int(made["process"])):
                # One that cannot be removed, or was by another process, does no harm.
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(place, name))


def _is_another_alive(process: int) -> bool:
    if process == os.getpid():
        return False  # In a container the killed process had the same number.
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def read_json(path: epath.Path, *keys: str) -> Any:
    """The object in a file; None where it is missing, damaged or without one of the keys.

    Raises:
        UserError: it may not be read.
    """
    try:
        found = json.loads(path.read_text()) if path.exists() else None
        return found if isinstance(found, dict) and found.keys() >= set(keys) else None
    except OSError as error:
        raise unread(path, error, "make it readable") from error
    except ValueError:
        return None
