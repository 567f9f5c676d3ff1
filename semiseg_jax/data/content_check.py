"""Mistakes that show only when the contents of several files are compared, as sentences.

A run and the check of splits (`splits`) use the same functions.
"""

import os
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int, Int16

from semiseg_jax.data import image_io
from semiseg_jax.data.dataset import Example
from semiseg_jax.data.file_content import FileCache, FileContent
from semiseg_jax.data.mask_format import VALUES, MaskFormat
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime.errors import UserError

# A file with its content.
File = tuple[str, FileContent]


def images_in_both(training: Iterable[File], evaluation: Iterable[File]) -> tuple[str, str] | None:
    """Returns the paths of two images with equal pixels, one of each set; None if there are none.

    Images of one colour are not compared: blank tiles of a larger picture are equal everywhere. A
    file that is in both sets is not reported: it is found by its path.
    """
    evaluated = {c.pixel_hash: path for path, c in evaluation if not c.is_blank}
    for path, content in training:
        other = evaluated.get(content.pixel_hash)
        if other is not None and os.path.realpath(other) != os.path.realpath(path):
            return path, other
    return None


def mask_warnings(masks: Sequence[File], table: Int16[np.ndarray, "256"]) -> list[str]:
    """Returns warnings about masks whose values seem to mean something else in other masks.

    Args:
        masks: masks of all sets.
        table: from mask value to class id (see `image_io.id_table`).
    """
    warnings = (_different_palettes(masks, table), _mixed_binary_values(masks, table))
    return [warning for warning in warnings if warning]


def _different_palettes(masks: Sequence[File], table: Int16[np.ndarray, "256"]) -> str | None:
    """Returns a warning that names two masks whose palettes contradict each other.

    They do if one value has two colours, or one colour has two values. The colours of ignored
    values are not compared. A colour that a single mask uses for two values tells nothing.
    """
    color_of: dict[int, tuple[str, str]] = {}
    value_of: dict[str, tuple[int, str]] = {}
    for path, content in masks:
        colors = {v: c for v, c in content.colors.items() if table[v] != IGNORE}
        repeated = {c for c in colors.values() if list(colors.values()).count(c) > 1}
        for value, color in colors.items():
            other_color, other = color_of.setdefault(value, (color, path))
            if other_color != color:
                return (
                    f"The palettes of masks differ: value {value} is #{color} in {path} and "
                    f"#{other_color} in {other}. If the value means another class there, convert "
                    "the masks to common values."
                )
            if color in repeated:
                continue
            other_value, other = value_of.setdefault(color, (value, path))
            if other_value != value:
                return (
                    f"The palettes of masks differ: colour #{color} is value {value} in {path} and "
                    f"value {other_value} in {other}. If it means the same class there, convert "
                    "the masks to common values."
                )
    return None


def _mixed_binary_values(masks: Sequence[File], table: Int16[np.ndarray, "256"]) -> str | None:
    """Returns a warning that names a 0/1 mask and a 0/255 mask of the same data.

    A mask that holds both 1 and 255 shows that 255 is the value of ignored pixels.
    """
    if table[IGNORE] != IGNORE:
        return None
    with_one = with_255 = None
    for path, content in masks:
        values = set(content.values)
        if not values <= {0, 1, IGNORE} or values >= {1, IGNORE}:
            return None
        with_one = with_one or (path if 1 in values else None)
        with_255 = with_255 or (path if values == {0, IGNORE} else None)
    if with_one is None or with_255 is None:
        return None
    return (
        f"{with_one} is a mask of 0 and 1, and {with_255} one of 0 and 255, whose 255 is ignored: "
        "if 1 and 255 mean the same class, add '--config.data.ignore_ids=()' "
        "'--config.data.id_map=((0,0),(1,1),(255,1))'."
    )


def class_warnings(
    counts: Int[np.ndarray, "256"], classes: Sequence[str], kind: str, effect: str
) -> list[str]:
    """Returns a warning if a set of masks to evaluate on lacks classes.

    Args:
        counts: pixels of each class id and of IGNORE in the masks.
        classes: class names in id order.
        kind: the kind of the masks for the sentence, such as "evaluation".
        effect: what is computed on the set, such as "the reported mIoU".
    """
    present = [name for name, count in zip(classes, counts, strict=False) if count]
    absent = [name for name, count in zip(classes, counts, strict=False) if not count]
    if not absent or not present:
        return []
    if len(present) == 1:
        return [
            f"The {kind} masks hold no class but {present[0]}, so that {effect} tells nothing of "
            f"{', '.join(absent)}: add images with these classes."
        ]
    return [
        f"No pixel of the {kind} masks is {', '.join(absent)}, so that {effect} tells nothing of "
        "it: add images with the class."
    ]


def check_pair(
    example: Example,
    table: Int16[np.ndarray, "256"],
    cache: FileCache,
    form: MaskFormat = VALUES,
) -> tuple[FileContent, FileContent]:
    """Checks the size and the values of a mask; returns the contents of image and mask.

    Args:
        example: a labelled or an evaluated image.
        table: int16 [256], the class id of each mask value.
        cache: of contents.
        form: how the pixels of the mask hold its values.

    Raises:
        UserError: the mask is missing, of another size, or has a value that is no class; or a file
            cannot be decoded.
    """
    if example.mask is None:
        raise UserError(
            f"{example.image} has no mask: add one, or take it out of its list.",
            code="mask-missing",
        )
    image, mask = cache.image(example.image), cache.mask(example.mask, form)
    if any(table[value] == image_io.UNKNOWN for value in mask.values):
        image_io.count_classes(example.mask, table, form)  # Raises an error that names the values.
    size, mask_size = image.size, mask.size
    if size != mask_size:
        hint = (
            "; the image is shown as its EXIF orientation says, and its mask must be too"
            if size == mask_size[::-1]
            else ""
        )
        raise UserError(
            f"{example.image} is {size[1]}x{size[0]} and its mask {example.mask} is "
            f"{mask_size[1]}x{mask_size[0]}: they must be of one size{hint}.",
            code="mask-size-differs",
        )
    return image, mask
