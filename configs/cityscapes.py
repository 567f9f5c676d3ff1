"""Cityscapes, 372 of its 2,975 training images labelled: the paper's DeepLabV3+ on Xception-65.

    python -m semiseg_jax.main --config=configs/cityscapes.py --config.data.root=/path/to/cityscapes
    python -m semiseg_jax.main --config=configs/cityscapes.py:1_4 …

The argument is the share of labelled images: 1_30 (100), 1_8 (372), 1_4 (744), 1_2 (1,488), or
full: all 2,975, and the images of train_extra as the unlabelled ones. Which images it is, is drawn
by data.split_seed; a community's lists go into data.labeled_list and data.unlabeled_list. The
folder is that of the extracted archives (docs/data.md); with the archives in TFDS's folder it is
--config.data.name=tfds:cityscapes/semantic_segmentation. Its scores have not been measured yet.
"""

from ml_collections import ConfigDict

from configs import default

LABELS = {"1_30": 100.0, "1_8": 372.0, "1_4": 744.0, "1_2": 1488.0, "full": 0.0}


def get_config(share: str = "1_8") -> ConfigDict:
    """The paper's recipe, with `share` of the training images labelled."""
    if share not in LABELS:
        raise ValueError(
            f"the argument of configs/cityscapes.py is {share!r}: make it one of "
            f"{', '.join(LABELS)}"
        )
    config = default.get_config()
    config.data.name = "cityscapes"
    config.data.labels = LABELS[share]
    config.data.train_extra = share == "full"
    config.data.crop = (769, 769)
    config.model.backbone = "xception65"
    return config
