"""Pascal VOC 2012 with SBD, 1,323 of its 10,582 training images labelled: ResNet-101 at 513.

    python -m semiseg_jax.main --config=configs/pascal_voc.py --config.data.root=/path/to/voc
    python -m semiseg_jax.main --config=configs/pascal_voc.py:xception65,1_4 …

The arguments, in any order: the backbone, resnet101 or xception65; and the share of labelled
images, 1_106 (100), 1_50 (212), 1_20 (529), 1_8 (1,323), 1_4 (2,646), or voc: the 1,464 of VOC's
own train list, those of SBD unlabelled. Which images the others are, is drawn by data.split_seed; a
community's lists go into data.labeled_list and data.unlabeled_list. The folder holds VOCdevkit and
SBD's masks (docs/data.md). Its scores have not been measured yet.
"""

from ml_collections import ConfigDict

from configs import default

BACKBONES = ("resnet101", "xception65")
LABELS = {"1_106": 100.0, "1_50": 212.0, "1_20": 529.0, "1_8": 1323.0, "1_4": 2646.0, "voc": 0.0}


def get_config(arguments: str = "") -> ConfigDict:
    """The paper's recipe on a backbone, with a share of the training images labelled."""
    backbone, share = "resnet101", "1_8"
    for argument in filter(None, arguments.split(",")):
        if argument in BACKBONES:
            backbone = argument
        elif argument in LABELS:
            share = argument
        else:
            raise ValueError(
                f"an argument of configs/pascal_voc.py is {argument!r}: make it one of "
                f"{', '.join((*BACKBONES, *LABELS))}"
            )
    config = default.get_config()
    config.data.name = "pascal_voc"
    config.data.labels = LABELS[share]
    if share == "voc":
        config.data.labeled_list = "ImageSets/Segmentation/train.txt"
    config.data.crop = (513, 513)
    config.model.backbone = backbone
    return config
