"""Images and masks in folders of one's own."""

import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int16

from semiseg_jax.data import labels
from semiseg_jax.data.examples import Example, Layout, Say, files_below, pairs
from semiseg_jax.data.places import data_root
from semiseg_jax.errors import UserError


def layout(config: Any, say: Say) -> Layout:
    """`data.image_dir` and `data.mask_dir`, with a subfolder for each set or without.

    Raises:
        UserError: the image folder is missing, or the classes' names, colours or ids are wrong.
    """
    data = config.data
    classes, palette, table = described_classes(data)
    root = data_root(data, "make it, with the images in one folder and the masks in another")
    sets: dict[str, tuple[Example, ...]] = {}
    for name in ("train", config.eval.split):
        nested = (root / data.image_dir / name).is_dir()
        below = name if nested else ""
        # Without a folder of their own, evaluation images come from data.evaluation_list or
        # data.holdout alone.
        if nested or name == "train":
            images, masks = (root / d / below for d in (data.image_dir, data.mask_dir))
            sets[name] = pairs(images, masks, data.image_suffix, data.mask_suffix)
            _say_what_has_no_image(sets[name], masks, data.mask_suffix, say)
    return Layout(
        name="folder",
        root=root,
        classes=classes,
        palette=palette,
        table=table,
        train=sets["train"],
        evaluation=sets.get(config.eval.split, ()),
    )


def described_classes(
    data_config: Any,
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...], Int16[np.ndarray, "256"]]:
    """Class names, palette and id table as `data.classes` and the keys beside it say.

    Raises:
        UserError: too few or too many names, colours for other than all of them or no colours at
            all, impossible ids.
    """
    data = data_config
    if not 2 <= len(data.classes) <= labels.IGNORE:
        raise UserError(
            f"data.classes has {len(data.classes)} names: name every class in id order, from 2 to "
            f"{labels.IGNORE} of them."
        )
    if len(data.palette) not in (0, len(data.classes)):
        raise UserError(
            f"data.palette has {len(data.palette)} colours for {len(data.classes)} classes: give "
            "one for each, or none."
        )
    palette = _colours(data.palette) or labels.generated_palette(len(data.classes))
    table = labels.id_table(len(data.classes), data.ignore_ids, data.id_map)
    return tuple(data.classes), palette, table


def _colours(palette: Sequence[Any]) -> tuple[tuple[int, int, int], ...]:
    """`data.palette`, looked at before it is first written with, which is after a training.

    Raises:
        UserError: one of it is not three integers from 0 to 255.
    """
    for colour in palette:
        try:
            fine = len(colour) == 3 and all(operator.index(level) in range(256) for level in colour)
        except TypeError:  # a name, or a number alone
            fine = False
        if not fine:
            raise UserError(
                f"data.palette has {colour!r}: make each of its colours (R, G, B), three integers "
                "from 0 to 255."
            )
    return tuple((int(red), int(green), int(blue)) for red, green, blue in palette)


def _say_what_has_no_image(
    examples: tuple[Example, ...], masks: epath.Path, suffix: str, say: Say
) -> None:
    """A mask that belongs to no image is most often a name that was meant otherwise."""
    if not masks.is_dir():
        return
    used = {e.mask for e in examples}
    files = (os.fspath(m) for m in files_below(masks) if m.name.endswith(suffix))
    unused = [m for m in files if m not in used]
    if unused:
        say(f"{len(unused)} masks below {masks} have no image of their name, such as {unused[0]}.")
