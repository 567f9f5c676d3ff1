"""Class ids and palettes, and image and label map files.

A label map is a PNG whose palette indices or grey levels are class ids. Pillow decodes images and
label maps everywhere in the project, so that training, labelling, evaluation and prediction read
the same pixels.
"""

import contextlib
import io
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Int16, UInt8
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from semiseg_jax.data import mask_format
from semiseg_jax.data.image_header import ImageFile, check_regular, format_of
from semiseg_jax.data.mask_format import VALUES, MaskFormat
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime.errors import UserError, first_line, read_error

# --- Class ids and palettes ----------------------------------------------------------------------

# In an id table: the value is neither a class nor ignored.
UNKNOWN = -1


def id_table(
    num_classes: int,
    ignore_ids: Sequence[int] = (IGNORE,),
    id_map: Sequence[Any] = (),
) -> Int16[np.ndarray, "256"]:
    """Returns the table from mask value to class id, IGNORE or UNKNOWN.

    Args:
        num_classes: class ids are 0 … num_classes - 1.
        ignore_ids: mask values that become IGNORE.
        id_map: (mask value, class id) pairs; empty if the mask values are the class ids.

    Raises:
        UserError: a mask value is not 0..255, a class id is not below `num_classes`, or a value
            is both a class and ignored.
    """
    try:
        pairs = [(int(value), int(class_id)) for value, class_id in id_map]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data.id_map is {id_map!r}: make it ((mask value, class id), …).",
            code="id-map-malformed",
        ) from error
    allowed = {*range(num_classes), IGNORE}
    for value, class_id in (*pairs, *((value, IGNORE) for value in ignore_ids)):
        if value not in range(256) or class_id not in allowed:
            raise UserError(
                f"data.id_map or data.ignore_ids makes mask value {value} class {class_id}: mask "
                f"values are 0 to 255 and class ids 0 to {num_classes - 1}.",
                code="mask-value-or-class-out-of-range",
            )
    both = sorted({value for value, class_id in pairs if class_id != IGNORE} & {*ignore_ids})
    if both:
        raise UserError(
            f"data.id_map gives mask value {both[0]} a class, and data.ignore_ids ignores it: take "
            "it out of one of them.",
            code="id-map-contradicts-ignore-ids",
        )
    table = np.full(256, UNKNOWN, np.int16)
    if id_map:
        for value, class_id in pairs:
            table[value] = class_id
    else:
        table[:num_classes] = np.arange(num_classes)
    table[list(ignore_ids)] = IGNORE
    return table


def full_palette(palette: Sequence[Sequence[int]]) -> UInt8[np.ndarray, "256 3"]:
    """Returns `palette` extended to 256 colours: white for IGNORE, black for the rest."""
    full = np.zeros((256, 3), np.uint8)
    full[: len(palette)] = palette
    full[IGNORE] = 255
    return full


def generated_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """Returns distinct colours, made by spreading the bits of the class id over the channels.

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


# --- Image and label map files -------------------------------------------------------------------


@contextlib.contextmanager
def _image_errors(path: epath.PathLike, message: str) -> Iterator[None]:
    """Turns exceptions about an image file into UserErrors; {} in `message` is the reason."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: restore it or take it out of its list.",
            code="image-missing",
        ) from error
    except PermissionError as error:
        raise read_error(path, error, "make it readable, or take it out of its list") from error
    except Exception as error:  # Pillow's decoders raise many types, even OverflowError.
        reason = first_line(error)
        if isinstance(error, UnidentifiedImageError):  # Its text names only a Python object.
            reason = "of no known kind" if epath.Path(path).stat().length else "the file is empty"
        raise UserError(
            f"{path} {message.format(reason)}",
            code="image-undecodable",
        ) from error


def _decode(path: epath.PathLike) -> tuple[ImageFile, Image.Image]:
    """Returns an image file and its decoded image; raises a UserError as `read_image` does."""
    message = (
        "cannot be decoded ({}): it is truncated, corrupt or not an image; replace it or remove it."
    )
    with _image_errors(path, message):
        check_regular(path)
        file = ImageFile(path, io.BytesIO(epath.Path(path).read_bytes()))
        return file, file.decode()


@contextlib.contextmanager
def open_header(path: epath.PathLike) -> Iterator[ImageFile]:
    """Opens an image or mask and reads only its header.

    Raises:
        UserError: the file is missing, not an image, or has too many pixels.
    """
    message = "is not an image ({}): replace it or remove it."
    with _image_errors(path, message):
        check_regular(path)
        with epath.Path(path).open("rb") as stream:
            yield ImageFile(path, stream)


def image_size(path: epath.PathLike) -> tuple[int, int]:
    """Returns (height, width) of the upright image in pixels; reads only the file's header.

    Raises:
        UserError: the file is missing, not an image, has too many pixels, or has more than 8 bits
            a channel.
    """
    with open_header(path) as file:
        _check_bit_depth(path, file)
        return file.size


def _check_bit_depth(path: epath.PathLike, file: ImageFile) -> None:
    if file.has_more_than_8_bits:
        raise UserError(
            f"{path} has more than 8 bits a channel (mode {file.raw_mode}): convert it to 8 bits, "
            "with the range that suits your images.",
            code="image-depth-unsupported",
        )


def read_image(path: epath.PathLike) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the upright RGB image of a file in any mode; grey is repeated, alpha dropped.

    Raises:
        UserError: the file is missing or damaged, or has too many pixels or more than 8 bits a
            channel.
    """
    file, image = _decode(path)
    # Before the conversion, which would cut the values to 8 bits.
    _check_bit_depth(path, file)
    if image.mode == "La":  # Pillow converts grey with premultiplied alpha to LA alone.
        image = image.convert("LA")
    # A conversion from RGB to RGB would copy the image.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _read_mask_values(
    path: epath.PathLike, table: Int16[np.ndarray, "256"], form: MaskFormat
) -> UInt8[np.ndarray, "h w"]:
    """Returns the values of a mask file: palette indices or grey levels, unless `form` says else.

    Grey levels of less than 8 bits are returned as they are stored or, if only that fits the table
    (see `id_table`), as they are shown.
    """
    file, image = _decode(path)
    if form != VALUES and file.has_more_than_8_bits:
        raise _unsupported_mode(path, file, image)
    if form.colors:
        return mask_format.values_of_colors(path, image, form)
    if form.threshold:
        return mask_format.values_of_levels(image, form)
    if form.channel and len(image.getbands()) > 1:
        return mask_format.values_of_channel(path, image, form)
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    if file.grey_scale is not None and image.mode in ("1", "L", "I"):
        largest, shown = file.grey_scale
        values = ((values.astype(np.int64) * largest + shown // 2) // shown).astype(values.dtype)
    if file.inverts_stored_values:
        values = (file.grey_scale or (255, 255))[0] - values
    # Some TIFF files hold signed integers. Cut to 8 bits, -1 would become IGNORE.
    if image.mode.startswith("I") and 0 <= values.min(initial=0) <= values.max(initial=0) < 256:
        values = values.astype(np.uint8)
    elif image.mode not in ("1", "L", "P"):
        raise _unsupported_mode(path, file, image)
    if file.grey_scale is not None and image.mode in ("1", "L"):
        return _shown_if_table_says(values, file.grey_scale, table)
    return values


def _unsupported_mode(path: epath.PathLike, file: ImageFile, image: Image.Image) -> UserError:
    """Returns the error of a mask whose pixels are no values from 0 to 255."""
    if len(image.getbands()) == 1 or file.has_more_than_8_bits:
        return UserError(
            f"{path} holds values outside 0 to 255 (mode {file.raw_mode}) where class ids are "
            "expected: save masks as palette or grey PNGs whose values are the class ids.",
            code="mask-mode-unsupported",
        )
    colors, grey_levels = mask_format.describe_colors(image)
    remedy = "give the class id of each in data.mask_colors, as ((colour, class id), …)"
    if grey_levels is not None and _is_binary(_histogram(grey_levels)):
        remedy = f"if light pixels are the object, {_THRESHOLD}; else {remedy}"
    elif grey_levels is not None:
        by_channel = "add --config.data.mask_channel=grey"
        remedy = f"if these levels are class ids, {by_channel}; else {remedy}"
    return UserError(
        f"{path} holds {colors}, where class ids are expected: {remedy}.",
        code="mask-in-color",
    )


def _shown_if_table_says(
    values: UInt8[np.ndarray, "h w"],
    grey_scale: tuple[int, int],
    table: Int16[np.ndarray, "256"],
) -> UInt8[np.ndarray, "h w"]:
    """Returns stored grey values spread over 0..255 if the table has classes for those alone.

    A mask of one bit holds 0 and 1, and most programs show 0 and 255: an id map may be for either.
    """
    present = np.flatnonzero(_histogram(values))
    unknown = table[present] == UNKNOWN
    if not unknown.any():
        return values
    largest, shown = grey_scale
    spread = np.rint(np.arange(256) / largest * shown).clip(max=255).astype(np.uint8)
    class_ids = table[spread[present]]
    if (class_ids == UNKNOWN).any() or (class_ids[unknown] == IGNORE).any():
        return values
    return spread[values]


def read_mask(
    path: epath.PathLike, table: Int16[np.ndarray, "256"], form: MaskFormat = VALUES
) -> UInt8[np.ndarray, "h w"]:
    """Reads a label map: class ids and IGNORE.

    Args:
        path: a palette or grey image; of a palette image the indices are read, not the colours.
            With `form` other images too.
        table: from `id_table`.
        form: how the pixels hold the values.

    Raises:
        UserError: the file is missing or damaged, or holds colours that `form` does not read, or
            holds a value that is neither a class nor ignored.
    """
    values = _read_mask_values(path, table, form)
    if (table == UNKNOWN).any():
        _check_values_known(path, _histogram(values), table)
    return table.astype(np.uint8)[values]


def count_classes(
    path: epath.PathLike, table: Int16[np.ndarray, "256"], form: MaskFormat = VALUES
) -> tuple[Int[np.ndarray, "256"], tuple[int, int]]:
    """Counts the pixels of each class id and of IGNORE in a label map.

    Returns:
        The counts by class id, and (height, width) of the label map in pixels.

    Raises:
        UserError: as `read_mask`.
    """
    values = _read_mask_values(path, table, form)
    value_counts = _histogram(values)
    _check_values_known(path, value_counts, table)
    class_counts = np.zeros(256, np.int64)
    np.add.at(class_counts, table.astype(np.uint8), value_counts)
    return class_counts, values.shape


def _histogram(values: UInt8[np.ndarray, "h w"]) -> Int[np.ndarray, "256"]:
    # Pillow counts bytes several times faster than NumPy.
    return np.array(Image.fromarray(values).histogram())


def _check_values_known(
    path: epath.PathLike, value_counts: Int[np.ndarray, "256"], table: Int16[np.ndarray, "256"]
) -> None:
    """Raises a UserError that names the mask values without an entry in the id table."""
    present = np.flatnonzero(value_counts)
    unknown = present[table[present] == UNKNOWN]
    if not len(unknown):
        return
    listing = ", ".join(map(str, unknown[:8])) + (", …" if len(unknown) > 8 else "")
    remedy = _remedy_for_unknown_values(path, value_counts, table)
    raise UserError(
        f"{path} holds the values {listing}, which are neither a class nor ignored: {remedy}.",
        code="mask-values-unknown",
    )


# Values beyond 0 and 255 are classes if there are few of them, and come from an interpolation if
# there are more than these, for two classes and for more.
_FEW_VALUES = {2: 2, 3: 16}
# So far from 0 and 255 a JPEG moves the values of a mask of these two, in most of its pixels.
_JPEG_RANGE = 24
# How a mask of 0 and 255 is read: flags that a shell takes as they are.
_BINARY_ID_MAP = "'--config.data.id_map=((0,0),(255,1))'"
BINARY_MASK_FLAGS = f"'--config.data.ignore_ids=()' {_BINARY_ID_MAP}"


# How a mask of two classes with levels in between is read.
_THRESHOLD = (
    "add --config.data.mask_threshold=128, which makes levels from 128 on class 1 and others "
    "class 0"
)


def _is_binary(counts: Int[np.ndarray, "256"]) -> bool:
    """Returns whether most pixels are nearly 0 or nearly 255, and some nearly 255.

    Args:
        counts: pixels by value.
    """
    low, high = counts[:_JPEG_RANGE].sum(), counts[-_JPEG_RANGE:].sum()
    return bool(high > 0 and low + high > 0.75 * counts.sum())


def _remedy_for_unknown_values(
    path: epath.PathLike, value_counts: Int[np.ndarray, "256"], table: Int16[np.ndarray, "256"]
) -> str:
    """Returns what to do about mask values that are neither a class nor ignored.

    Args:
        path: the mask.
        value_counts: number of its pixels by value.
        table: from `id_table`.
    """
    present = np.flatnonzero(value_counts)
    unknown = present[table[present] == UNKNOWN]
    is_binary = _is_binary(value_counts)
    num_classes = len({*table.tolist()} - {UNKNOWN, IGNORE})
    again = "save it again from its source, without loss and without interpolation"
    if is_binary and num_classes <= 2:
        again = _THRESHOLD
    if format_of(path) in ("JPEG", "MPO"):
        return f"it is a JPEG, whose compression changes values where classes meet; {again}"
    if is_binary and len(unknown) > _FEW_VALUES[min(max(num_classes, 2), 3)]:
        return f"they look like the soft edges of a mask of 0 and 255; {again}"
    hint = ""
    if IGNORE in unknown and len(present) <= 2:
        hint = f" (a 0/255 mask: map 255 to class 1 with {_BINARY_ID_MAP})"
    return f"give them in data.id_map or data.ignore_ids{hint}"


def encode_mask(
    mask: UInt8[np.ndarray, "h w"],
    palette: Sequence[Sequence[int]],
    text: dict[str, str] | None = None,
) -> bytes:
    """Encodes a label map as a palette PNG, with `text` in its text chunks."""
    image = Image.fromarray(mask)
    image.putpalette(full_palette(palette).tobytes())
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    buffer = io.BytesIO()
    # bits=8: Pillow would pack few classes into fewer bits, which some readers scale. Label maps
    # consist of runs of one value. Run-length compression takes a quarter of the time of the
    # default, for files that are a quarter larger.
    options: Any = {"bits": 8, "compress_type": zlib.Z_RLE}
    image.save(buffer, "PNG", pnginfo=chunks, **options)
    return buffer.getvalue()


def read_png(path: epath.PathLike) -> tuple[UInt8[np.ndarray, "..."], dict[str, str]]:
    """Returns the stored values and the text chunks of a PNG written by `encode_mask`.

    The values are [h, w] unless another program has written the file.

    Raises:
        UserError: the file is missing or damaged.
    """
    _, image = _decode(path)
    text = {str(k): v for k, v in image.info.items() if isinstance(v, str)}
    return np.asarray(image).astype(np.uint8), text
