"""Data sets in plain folders: one of images, one of masks."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int16

from semiseg_jax.data import image_io, split_folders
from semiseg_jax.data.dataset import Example, Layout, files_below, is_image, pairs
from semiseg_jax.data.folder_walk import inside
from semiseg_jax.data.mask_format import MaskFormat, palette_of_colors
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import logger
from semiseg_jax.runtime.paths import data_root


def layout(config: Any) -> Layout:
    """Returns the layout of `data.image_dir` and `data.mask_dir`, with or without split folders.

    Raises:
        UserError: the image folder is missing, or the names, colours or ids of the classes are
            wrong.
    """
    data = config.data
    classes, palette, table, form = classes_from_config(data)
    root = data_root(data, "make it, with the images in one folder and the masks in another")
    train, evaluation = _examples(root, data, config.eval.split)
    return Layout(
        name="folder",
        root=root,
        classes=classes,
        palette=palette,
        table=table,
        train=train,
        evaluation=evaluation,
        mask_format=form,
    )


# A folder of images and the folder of their masks.
_Folders = tuple[epath.Path, epath.Path]


def _examples(
    root: epath.Path, data_config: Any, eval_split: str
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Returns the training and the evaluation images, and logs which images are not read.

    Without a folder of evaluation images, these come only from data.evaluation_list or
    data.holdout. Without a folder of training images, these are all images; those in folders of
    evaluation images only if data.evaluation_list says which images are evaluated.
    """
    data = data_config
    suffixes = data.image_suffix, data.mask_suffix
    whole = root / data.image_dir, root / data.mask_dir
    train, evaluation = (_split_folders(root, data, split) for split in ("train", eval_split))

    def is_evaluation_folder(folder: epath.Path) -> bool:
        return folder.parent in whole and split_folders.is_evaluation(folder.name, eval_split)

    if train:
        train_examples = pairs(*train, *suffixes)
    elif data.evaluation_list:
        train_examples = pairs(*whole, *suffixes)
    else:
        train_examples = pairs(*whole, *suffixes, is_evaluation_folder)
    evaluation_examples = pairs(*evaluation, *suffixes) if evaluation else ()
    if not data.evaluation_list:
        _report_unread_folders(root, data, eval_split, train, evaluation)
    return train_examples, evaluation_examples


def _split_folders(root: epath.Path, data_config: Any, split: str) -> _Folders | None:
    """Returns the folders of a split: images/SPLIT and masks/SPLIT, or SPLIT/images and …/masks.

    The second layout is read only if `data.image_dir` is no folder below the root.

    Args:
        root: the root folder of the data set.
        data_config: `config.data`; `image_dir` and `mask_dir` are read.
        split: name of the split; its folder may have another of the split's names.
    """
    image_dir, mask_dir = (root / d for d in (data_config.image_dir, data_config.mask_dir))
    if image_dir.is_dir():
        images = split_folders.find(image_dir, split)
        if images is None:
            return None
        masks = mask_dir / images.name
        if not masks.is_dir():
            masks = split_folders.find(mask_dir, split, holds_masks=True) or masks
        return images, masks
    parent = split_folders.find(root, split)
    if parent is None or not (parent / data_config.image_dir).is_dir():
        return None
    return parent / data_config.image_dir, parent / data_config.mask_dir


def _report_unread_folders(
    root: epath.Path,
    data_config: Any,
    eval_split: str,
    train: _Folders | None,
    evaluation: _Folders | None,
) -> None:
    """Logs folders of images beside those that are read, such as those of a further split.

    A test set is expected to be there unread if there is another evaluation set.
    """
    data = data_config
    images = root / data.image_dir
    # Folders of splits, and where their images are inside them.
    parent, inner = (images, "") if images.is_dir() else (root, data.image_dir)
    folders = [f for f in inside(parent) if f.is_dir() and not f.name.startswith(".")]
    if not train:
        folders = [f for f in folders if split_folders.is_evaluation(f.name, eval_split)]
    if evaluation:
        folders = [f for f in folders if split_folders.split_of(f.name) != "test"]
    unread = [f / inner for f in folders]
    if not train and not evaluation:
        unread += _evaluation_beside(root, data.image_dir, eval_split)
    read = {split[0] for split in (train, evaluation) if split}
    # The folder of the masks may be one of the folders, or be inside of one.
    read |= {root / data.mask_dir, *(root / data.mask_dir).parents}
    counts = {
        folder: sum(is_image(file.name, data.image_suffix) for file in files_below(folder))
        for folder in unread
        if folder not in read and folder.is_dir()
    }
    if train and not inner:
        # Images beside the folder of the training images.
        counts[parent] = sum(is_image(file.name, data.image_suffix) for file in inside(parent))
    listing = ", ".join(f"{folder} ({count} images)" for folder, count in counts.items() if count)
    if listing:
        evaluated = f"evaluates on {evaluation[0]}" if evaluation else f"has no {eval_split} folder"
        logger.warning(
            f"Not read: {listing}. The run trains on {train[0] if train else images} and "
            f"{evaluated}: see eval.split, data.image_dir and data.unlabeled_dir."
        )


def _evaluation_beside(root: epath.Path, image_dir: str, eval_split: str) -> list[epath.Path]:
    """Returns the folder of evaluation images beside an image folder such as images/train."""
    components = epath.Path(image_dir).parts
    for number, name in enumerate(components):
        if split_folders.split_of(name) == "train":
            folder = split_folders.find(root.joinpath(*components[:number]), eval_split)
            if folder is not None:
                return [folder.joinpath(*components[number + 1 :])]
    return []


def classes_from_config(
    data_config: Any,
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...], Int16[np.ndarray, "256"], MaskFormat]:
    """Returns class names, palette, id table and the format of the masks.

    Args:
        data_config: `config.data`; `classes`, `palette`, `ignore_ids`, `id_map` and the keys of
            `MaskFormat.from_config` are read.

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
    form = MaskFormat.from_config(data)
    palette = (
        _checked_palette(data.palette)
        or palette_of_colors(form, len(data.classes))
        or image_io.generated_palette(len(data.classes))
    )
    # With values that are class ids already, these keys have nothing to act on.
    ids = ((image_io.IGNORE,), ()) if form.gives_classes else (data.ignore_ids, data.id_map)
    table = image_io.id_table(len(data.classes), *ids)
    return tuple(data.classes), palette, table, form


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
