"""Data sets in plain folders: one of images, one of masks."""

import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int16

from semiseg_jax.data import image_io
from semiseg_jax.data.dataset import Example, Layout, files_below, pairs
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import logger
from semiseg_jax.runtime.paths import data_root


def layout(config: Any) -> Layout:
    """Returns the layout of `data.image_dir` and `data.mask_dir`, with or without split subfolders.

    Raises:
        UserError: the image folder is missing, or the names, colours or ids of the classes are
            wrong.
    """
    data = config.data
    classes, palette, table = classes_from_config(data)
    root = data_root(data, "make it, with the images in one folder and the masks in another")
    examples: dict[str, tuple[Example, ...]] = {}
    for split in ("train", config.eval.split):
        has_subfolder = (root / data.image_dir / split).is_dir()
        subfolder = split if has_subfolder else ""
        # Without a subfolder, evaluation images come only from data.evaluation_list or
        # data.holdout.
        if has_subfolder or split == "train":
            images, masks = (root / d / subfolder for d in (data.image_dir, data.mask_dir))
            examples[split] = pairs(images, masks, data.image_suffix, data.mask_suffix)
            _report_unused_masks(examples[split], masks, data.mask_suffix)
    return Layout(
        name="folder",
        root=root,
        classes=classes,
        palette=palette,
        table=table,
        train=examples["train"],
        evaluation=examples.get(config.eval.split, ()),
    )


def classes_from_config(
    data_config: Any,
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...], Int16[np.ndarray, "256"]]:
    """Returns class names, palette and id table.

    Args:
        data_config: `config.data`; `classes`, `palette`, `ignore_ids` and `id_map` are read.

    Raises:
        UserError: the number of names is out of range, the palette is neither empty nor complete,
            a colour is invalid, or an id is impossible.
    """
    data = data_config
    if not 2 <= len(data.classes) <= image_io.IGNORE:
        raise UserError(
            f"data.classes has {len(data.classes)} names: name every class in id order, from 2 to "
            f"{image_io.IGNORE} of them.",
            code="class-count-invalid",
        )
    if len(data.palette) not in (0, len(data.classes)):
        raise UserError(
            f"data.palette has {len(data.palette)} colours for {len(data.classes)} classes: give "
            "one for each, or none.",
            code="palette-length-differs",
        )
    palette = _checked_palette(data.palette) or image_io.generated_palette(len(data.classes))
    table = image_io.id_table(len(data.classes), data.ignore_ids, data.id_map)
    return tuple(data.classes), palette, table


def _checked_palette(palette: Sequence[Any]) -> tuple[tuple[int, int, int], ...]:
    """Returns `data.palette` as integers.

    The palette is first written with after a training, so an error there would cost the training.

    Raises:
        UserError: a colour is not three integers from 0 to 255.
    """
    for colour in palette:
        try:
            valid = len(colour) == 3 and all(
                operator.index(level) in range(256) for level in colour
            )
        except TypeError:  # a name or a single number
            valid = False
        if not valid:
            raise UserError(
                f"data.palette has {colour!r}: make each of its colours (R, G, B), three integers "
                "from 0 to 255.",
                code="palette-color-invalid",
            )
    return tuple((int(red), int(green), int(blue)) for red, green, blue in palette)


def _report_unused_masks(examples: tuple[Example, ...], masks: epath.Path, suffix: str) -> None:
    """Prints the number of masks without an image; such a mask is usually misnamed."""
    if not masks.is_dir():
        return
    used = {e.mask for e in examples}
    paths = (os.fspath(m) for m in files_below(masks) if m.name.endswith(suffix))
    unused = [path for path in paths if path not in used]
    if unused:
        logger.info(
            f"{len(unused)} masks below {masks} have no image of their name, such as {unused[0]}."
        )
