"""Images and label maps on disk: read exactly, written atomically.

A label map is a PNG whose palette indices (or grey levels) are class ids. Pillow decodes both
kinds of file everywhere in the project, so that training, labelling, evaluation and prediction
see the same pixels.
"""

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int16, UInt8
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from semiseg_jax.errors import UserError

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
        UserError: a mask value is not 0..255, or a class id not below `num_classes`.
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
    table = np.full(256, UNKNOWN, np.int16)
    if id_map:
        for value, class_id in pairs:
            table[value] = class_id
    else:
        table[:num_classes] = np.arange(num_classes)
    table[list(ignore_ids)] = IGNORE
    return table


def _open(path: epath.PathLike) -> Image.Image:
    """The decoded image; a damaged or missing file is one sentence."""
    try:
        image = Image.open(io.BytesIO(epath.Path(path).read_bytes()))
        image.load()
        return image
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: restore it or take it out of its list.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path} cannot be decoded ({error}): it is truncated, corrupt or not an image; "
            "replace it or take it out of its list."
        ) from error


def image_size(path: epath.PathLike) -> tuple[int, int]:
    """(height, width) in pixels, from the file's header alone.

    Raises:
        UserError: the file is missing or not an image.
    """
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as image:
            return image.height, image.width
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: restore it or take it out of its list.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(
            f"{path} is not an image ({error}): replace it or take it out of its list."
        ) from error


def read_image(path: epath.PathLike) -> UInt8[np.ndarray, "h w 3"]:
    """RGB image, whatever the file's mode.

    Raises:
        UserError: the file is missing, damaged, or of a mode with more than 8 bits a channel.
    """
    image = _open(path)
    if image.mode.startswith(("I", "F")):
        raise UserError(
            f"{path} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits."
        )
    return np.asarray(image.convert("RGB"))


def read_mask(path: epath.PathLike, table: Int16[np.ndarray, "256"]) -> UInt8[np.ndarray, "h w"]:
    """Label map: class ids, and IGNORE.

    Args:
        path: a palette or grey PNG; palette indices are taken, not colours.
        table: from `id_table`.

    Raises:
        UserError: the file is missing or damaged, holds colours instead of indices, or a value
            that is neither a class nor ignored.
    """
    image = _open(path)
    if image.mode == "1":
        image = image.convert("L")
    if image.mode not in ("P", "L"):
        raise UserError(
            f"{path} holds colours (mode {image.mode}) where class ids are expected: save masks as "
            "palette or grey PNGs whose values are the class ids."
        )
    values = np.asarray(image)
    mask = table[values]
    if (mask == UNKNOWN).any():
        unknown = np.unique(values[mask == UNKNOWN])
        named = ", ".join(map(str, unknown[:8])) + (", …" if len(unknown) > 8 else "")
        hint = ""
        if IGNORE in unknown and len(np.unique(values)) <= 2:
            hint = " (a 0/255 mask: map 255 to class 1 with data.id_map=((0,0),(255,1)))"
        raise UserError(
            f"{path} holds the values {named}, which are neither a class nor ignored: give them "
            f"in data.id_map or data.ignore_ids{hint}."
        )
    return mask.astype(np.uint8)


def encode_mask(
    mask: UInt8[np.ndarray, "h w"],
    palette: Sequence[Sequence[int]],
    text: dict[str, str] | None = None,
) -> bytes:
    """A palette PNG of the label map; `text` goes into its text chunks."""
    image = Image.fromarray(mask)
    image.putpalette(full_palette(palette).ravel().tolist())
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    buffer = io.BytesIO()
    # bits=8: Pillow would pack few classes into fewer bits, which some readers scale.
    image.save(buffer, "PNG", pnginfo=chunks, bits=8)
    return buffer.getvalue()


def read_text(path: epath.PathLike) -> dict[str, str]:
    """The text chunks of a label map written by `encode_mask`, the image decoded on the way.

    Raises:
        UserError: the file is missing or damaged.
    """
    image = _open(path)
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


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file so that it is never seen half-written: temporary name, then rename.

    Raises:
        UserError: the disk is full or not writable.
    """
    target = epath.Path(path)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(target)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}): free space or give another "
            "folder, and start again."
        ) from error


def remove_leftovers(folder: epath.PathLike) -> None:
    """Removes the temporary files below a folder that `write_bytes` left when it was killed."""
    folder = epath.Path(folder)
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir():
            remove_leftovers(path)
        elif path.name.startswith(".") and path.suffix == ".tmp":
            path.unlink()
