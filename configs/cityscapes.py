"""Cityscapes, 372 of its 2,975 training images labelled: the paper's DeepLabV3+ on Xception-65.

    python -m semiseg_jax.main --config=configs/cityscapes.py --config.data.root=/path/to/cityscapes
    python -m semiseg_jax.main --config=configs/cityscapes.py:1_4 …
    python -m semiseg_jax.main --config=configs/cityscapes.py:dinov2_s,1_8 …

Arguments, in any order: the share of labelled images, 1_30 (100), 1_8 (372, the default), 1_4
(744), 1_2 (1,488), or full: all 2,975, with the images of train_extra as unlabelled images; the
backbone, xception65 (the default), or dinov2_s or dinov2_b for the paper's rounds on DINOv2 with
the head and optimiser of UniMatch V2. data.split_seed draws the labelled images; published split
lists go into data.labeled_list and data.unlabeled_list. The data folder holds the extracted
archives (docs/data.md); to read the archives in TFDS's folder instead, set
--config.data.name=tfds:cityscapes/semantic_segmentation.

Expected score and time: not measured. Lower bound of the time of the default on a TPU v5e:4x4 in
bfloat16: 0.28 hours, as planned from the compiled programs (docs/scaling.md).
"""

from ml_collections import ConfigDict

from configs import _arguments, _dinov2, default

LABELS = {"1_30": 100.0, "1_8": 372.0, "1_4": 744.0, "1_2": 1488.0, "full": 0.0}
BACKBONES = ("xception65", "dinov2_s", "dinov2_b")


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the paper's recipe with the backbone and share of labelled images in `arguments`."""
    kinds = ("xception65", BACKBONES), ("1_8", LABELS)
    backbone, share = _arguments.choose(arguments, "configs/cityscapes.py", *kinds)
    config = default.get_config()
    config.data.name = "cityscapes"
    config.data.labels = LABELS[share]
    config.data.train_extra = share == "full"
    if backbone.startswith("dinov2"):
        # Whole images are too many tokens; windows overlap by a third.
        config.data.crop = config.eval.window = config.pseudo.window = (798, 798)
        config.eval.window_stride = config.pseudo.window_stride = (532, 532)
        return _dinov2.use(config, backbone[-1])
    config.data.crop = (769, 769)
    config.model.backbone = backbone
    return config
