"""Cityscapes with its 19 training classes, from the extracted archives.

    leftImg8bit/{train,val,test,train_extra}/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png
    gtFine/{train,val}/CITY/CITY_SEQUENCE_FRAME_gtFine_labelIds.png

or `…_gtFine_labelTrainIds.png` in their place. Coarse labels are never read.

Source: Cordts et al., CVPR 2016, and the label table of the data set's own scripts.
"""

import os
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int16

from semiseg_jax.data import labels
from semiseg_jax.data.examples import Example, Layout, Say, files_below
from semiseg_jax.data.places import data_root
from semiseg_jax.errors import UserError

# Training id: (id in labelIds files, name, colour).
TRAIN_IDS = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CLASSES = tuple(name for _, name, _ in TRAIN_IDS)
PALETTE = tuple(colour for _, _, colour in TRAIN_IDS)
NUM_LABEL_IDS = 34

IMAGE = "_leftImg8bit.png"
LABEL_IDS, LABEL_TRAIN_IDS = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"
# This one of train_extra is all black: its file was damaged at the source.
DAMAGED = ("troisdorf_000000_000073",)


def label_ids_table() -> Int16[np.ndarray, "256"]:
    """From the ids of labelIds files to training ids; those that have none are ignored."""
    mapped = [(label_id, train_id) for train_id, (label_id, _, _) in enumerate(TRAIN_IDS)]
    used = {label_id for label_id, _ in mapped}
    ignored = [i for i in range(NUM_LABEL_IDS) if i not in used]
    return labels.id_table(len(TRAIN_IDS), (*ignored, labels.IGNORE), mapped)


def layout(config: Any, say: Say) -> Layout:
    """Cityscapes below `data.root`; with `data.train_extra`, its further images unlabelled.

    Raises:
        UserError: a folder is missing, or there are masks of both kinds and neither is complete.
    """
    root = data_root(
        config.data,
        "register at the Cityscapes site, download leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip (with data.train_extra also leftImg8bit_trainextra.zip), and "
        "extract them into one folder",
    )
    refuse_test_split(config)
    images = {split: _images(root, split) for split in ("train", config.eval.split)}
    suffix = _kind_of_masks(root, [image for part in images.values() for image in part])
    sets = {
        split: tuple(_example(root, image, split, suffix) for image in part)
        for split, part in images.items()
    }
    further: tuple[Example, ...] = ()
    if config.data.train_extra:
        found = (Example(_id(i), os.fspath(i), None) for i in _images(root, "train_extra"))
        further = tuple(e for e in found if e.id not in DAMAGED)
    return Layout(
        name="cityscapes",
        root=root,
        classes=CLASSES,
        palette=PALETTE,
        table=labels.id_table(len(CLASSES)) if suffix == LABEL_TRAIN_IDS else label_ids_table(),
        train=sets["train"],
        evaluation=sets[config.eval.split],
        further=further,
        # Lists name labelTrainIds files, which many have not made: the truth is the same.
        masks_of_lists=False,
    )


def refuse_test_split(config: Any) -> None:
    """The public masks of the test set hold no class.

    Raises:
        UserError: `eval.split` is test.
    """
    if config.eval.split == "test":
        raise UserError(
            "eval.split is test, but the labels of Cityscapes' test images are not public: make it "
            "val."
        )


def _images(root: epath.Path, split: str) -> list[epath.Path]:
    folder = root / "leftImg8bit" / split
    if not folder.is_dir():
        raise UserError(
            f"The image folder {folder} is missing: extract the archive that holds it into {root}, "
            "or correct data.root."
        )
    return [path for path in files_below(folder) if path.name.endswith(IMAGE)]


def _id(image: epath.Path) -> str:
    return image.name.removesuffix(IMAGE)


def _mask(root: epath.Path, image: epath.Path, split: str, suffix: str) -> epath.Path:
    return root / "gtFine" / split / image.parent.name / f"{_id(image)}{suffix}"


def _example(root: epath.Path, image: epath.Path, split: str, suffix: str) -> Example:
    mask = _mask(root, image, split, suffix)
    return Example(_id(image), os.fspath(image), os.fspath(mask) if mask.exists() else None)


def _kind_of_masks(root: epath.Path, images: list[epath.Path]) -> str:
    """Which kind of mask there is for every image that has one of either kind."""
    masks = {os.path.basename(m) for m in _files(root / "gtFine")}
    lacking: dict[str, list[str]] = {LABEL_IDS: [], LABEL_TRAIN_IDS: []}
    for image in images:
        names = {suffix: f"{_id(image)}{suffix}" for suffix in lacking}
        if masks.isdisjoint(names.values()):
            continue
        for suffix, name in names.items():
            if name not in masks:
                lacking[suffix].append(name)
    for suffix, missing in lacking.items():
        if not missing:
            return suffix
    raise UserError(
        f"{root / 'gtFine'} holds both labelIds and labelTrainIds files, but "
        f"{lacking[LABEL_IDS][0]} and {lacking[LABEL_TRAIN_IDS][0]} are missing: complete one kind."
    )


def _files(folder: epath.Path) -> list[epath.Path]:
    return list(files_below(folder)) if folder.is_dir() else []
