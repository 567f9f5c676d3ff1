"""Writes label maps as mask files that a data set reads as the same classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image

from semiseg_jax.data import image_io, mask_format
from semiseg_jax.data.dataset import Dataset
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime.errors import UserError


def write(path: Path, label_map: UInt8[np.ndarray, "h w"], dataset: Dataset) -> None:
    """Writes a mask as PNG: values, colours or levels, as the other masks of the data set are.

    Args:
        path: of the new file; its folder is created.
        label_map: class ids and IGNORE.
        dataset: has the table and the format of masks.

    Raises:
        UserError: the data set has no value for a class of the label map, or reads it differently.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    form = dataset.mask_format
    if form.colors:
        image = Image.fromarray(_colors(label_map, form, dataset.classes, path))
    elif form.threshold:
        image = Image.fromarray(np.where(label_map == 1, 255, 0).astype(np.uint8))
    else:
        values = _values(label_map, dataset.table, dataset.classes, path)
        if form.channel:
            image = Image.fromarray(np.repeat(values[..., None], 3, axis=-1))
        else:
            path.write_bytes(image_io.encode_mask(values, dataset.palette))
            image = None
    if image is not None:
        image.save(path, "PNG")
    if not np.array_equal(image_io.read_mask(path, dataset.table, form), label_map):
        raise UserError(
            f"{path} would be read as other classes by data.id_map, data.ignore_ids or the "
            "data.mask_ keys of this run, such as pixels without a label under "
            "data.mask_threshold: label every pixel, or use masks of class ids.",
            code="merged-mask-reads-differently",
        )


def _values(
    label_map: UInt8[np.ndarray, "h w"],
    table: Int16[np.ndarray, "256"],
    classes: Sequence[str],
    path: Path,
) -> UInt8[np.ndarray, "h w"]:
    """Returns the mask values of class ids."""
    lookup = np.zeros(256, np.uint8)
    for class_id in np.unique(label_map).tolist():
        values = np.flatnonzero(table == class_id)
        if not len(values):
            raise _no_value(class_id, classes, path)
        # The id itself where it means the class, as 255 does where it means no label.
        lookup[class_id] = class_id if class_id in values else values[0]
    return lookup[label_map]


def _colors(
    label_map: UInt8[np.ndarray, "h w"],
    form: mask_format.MaskFormat,
    classes: Sequence[str],
    path: Path,
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the colours of class ids."""
    first = dict(reversed([(value, color) for color, value in form.colors]))
    lookup = np.zeros((256, 3), np.uint8)
    for class_id in np.unique(label_map).tolist():
        if class_id not in first:
            raise _no_value(class_id, classes, path)
        lookup[class_id] = first[class_id]
    return lookup[label_map]


def _no_value(class_id: int, classes: Sequence[str], path: Path) -> UserError:
    name = "no label" if class_id == IGNORE else classes[class_id]
    return UserError(
        f"{path} cannot be written, because the masks of this run have no value that means {name}: "
        "name one in data.ignore_ids, data.id_map or data.mask_colors, or label these pixels.",
        code="merged-mask-without-value",
    )
