"""Cityscapes, 372 of its 2,975 training images labelled: the paper's DeepLabV3+ on Xception-65.

    python -m semiseg_jax.main --config=configs/cityscapes.py --config.data.root=/path/to/cityscapes
    python -m semiseg_jax.main --config=configs/cityscapes.py:1_4 …

The argument is the share of labelled images: 1_30 (100), 1_8 (372, the default), 1_4 (744), 1_2
(1,488), or full: all 2,975, with the images of train_extra as unlabelled images. data.split_seed
draws the labelled images; published split lists go into data.labeled_list and data.unlabeled_list.
The data folder holds the extracted archives (docs/data.md); to read the archives in TFDS's folder
instead, set --config.data.name=tfds:cityscapes/semantic_segmentation.

Expected score and time: not measured. Lower bound of the time on a TPU v5e:4x4 in bfloat16:
0.28 hours, as planned from the compiled programs (docs/scaling.md).
"""

from ml_collections import ConfigDict

from configs import default

LABELS = {"1_30": 100.0, "1_8": 372.0, "1_4": 744.0, "1_2": 1488.0, "full": 0.0}


def get_config(share: str = "1_8") -> ConfigDict:
    """Returns the paper's recipe with `share` of the training images labelled."""
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
