"""Cityscapes with its 19 training classes, from the extracted archives.

    leftImg8bit/{train,val,test,train_extra}/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png
    gtFine/{train,val}/CITY/CITY_SEQUENCE_FRAME_gtFine_labelIds.png

`…_gtFine_labelTrainIds.png` may replace the labelIds files. Coarse labels are never read.

Source: Cordts et al., CVPR 2016, and the label table of the official cityscapesScripts.
"""

import os
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int16

from semiseg_jax.data import image_io
from semiseg_jax.data.dataset import Example, Layout, files_below
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.paths import data_root

# (id in labelIds files, name, colour) of each class; the position is the training id.
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

IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_IDS_SUFFIX = "_gtFine_labelIds.png"
LABEL_TRAIN_IDS_SUFFIX = "_gtFine_labelTrainIds.png"
# This image of train_extra is all black in the official archive.
DAMAGED_IMAGES = ("troisdorf_000000_000073",)


def label_ids_table() -> Int16[np.ndarray, "256"]:
    """Returns the table from labelIds values to training ids; values without one are ignored."""
    id_map = [(label_id, train_id) for train_id, (label_id, _, _) in enumerate(TRAIN_IDS)]
    mapped_ids = {label_id for label_id, _ in id_map}
    ignored_ids = [i for i in range(NUM_LABEL_IDS) if i not in mapped_ids]
    return image_io.id_table(len(TRAIN_IDS), (*ignored_ids, image_io.IGNORE), id_map)


def layout(config: Any) -> Layout:
    """Returns the layout of Cityscapes below `data.root`.

    With `data.train_extra`, the images of train_extra are added as unlabelled images.

    Raises:
        UserError: a folder is missing, or both kinds of mask exist and neither is complete.
    """
    root = data_root(
        config.data,
        "register at the Cityscapes site, download leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip (with data.train_extra also leftImg8bit_trainextra.zip), and "
        "extract them into one folder",
    )
    check_eval_split(config)
    images = {split: _images(root, split) for split in ("train", config.eval.split)}
    suffix = _complete_mask_suffix(root, [image for split in images.values() for image in split])

    def example(image: epath.Path, split: str) -> Example:
        mask = root / "gtFine" / split / image.parent.name / f"{_id(image)}{suffix}"
        return Example(_id(image), os.fspath(image), os.fspath(mask) if mask.exists() else None)

    examples = {
        split: tuple(example(image, split) for image in split_images)
        for split, split_images in images.items()
    }
    further: tuple[Example, ...] = ()
    if config.data.train_extra:
        extra = (Example(_id(i), os.fspath(i), None) for i in _images(root, "train_extra"))
        further = tuple(e for e in extra if e.id not in DAMAGED_IMAGES)
    is_train_ids = suffix == LABEL_TRAIN_IDS_SUFFIX
    return Layout(
        name="cityscapes",
        root=root,
        classes=CLASSES,
        palette=PALETTE,
        table=image_io.id_table(len(CLASSES)) if is_train_ids else label_ids_table(),
        train=examples["train"],
        evaluation=examples[config.eval.split],
        further=further,
        # Split lists name labelTrainIds files, which many users never create. The labelIds files
        # hold the same labels.
        masks_of_lists=False,
    )


def check_eval_split(config: Any) -> None:
    """Raises if the config evaluates on the test set, whose public masks hold no class.

    Raises:
        UserError: `eval.split` is test.
    """
    if config.eval.split == "test":
        raise UserError(
            "eval.split is test, but the labels of Cityscapes' test images are not public: make it "
            "val.",
            code="cityscapes-test-labels-private",
        )


def _images(root: epath.Path, split: str) -> list[epath.Path]:
    folder = root / "leftImg8bit" / split
    if not folder.is_dir():
        raise UserError(
            f"The image folder {folder} is missing: extract the archive that holds it into {root}, "
            "or correct data.root.",
            code="cityscapes-folder-missing",
        )
    return [path for path in files_below(folder) if path.name.endswith(IMAGE_SUFFIX)]


def _id(image: epath.Path) -> str:
    return image.name.removesuffix(IMAGE_SUFFIX)


def _complete_mask_suffix(root: epath.Path, images: list[epath.Path]) -> str:
    """Returns the suffix of the mask kind that exists for every image with any mask."""
    folder = root / "gtFine"
    masks = {os.path.basename(m) for m in files_below(folder)} if folder.is_dir() else set()
    missing: dict[str, list[str]] = {LABEL_IDS_SUFFIX: [], LABEL_TRAIN_IDS_SUFFIX: []}
    for image in images:
        names = {suffix: f"{_id(image)}{suffix}" for suffix in missing}
        if masks.isdisjoint(names.values()):
            continue
        for suffix, name in names.items():
            if name not in masks:
                missing[suffix].append(name)
    for suffix, missing_names in missing.items():
        if not missing_names:
            return suffix
    raise UserError(
        f"{folder} holds both labelIds and labelTrainIds files, but "
        f"{missing[LABEL_IDS_SUFFIX][0]} and {missing[LABEL_TRAIN_IDS_SUFFIX][0]} are missing: "
        "complete one kind.",
        code="cityscapes-masks-incomplete",
    )
