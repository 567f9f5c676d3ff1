"""Pascal VOC 2012 with SBD, 1,323 of its 10,582 training images labelled: ResNet-101 at 513.

    python -m semiseg_jax.main --config=configs/pascal_voc.py --config.data.root=/path/to/voc
    python -m semiseg_jax.main --config=configs/pascal_voc.py:xception65,1_4 …

Arguments, in any order: the backbone, resnet101 (the default), xception65, or dinov2_s or dinov2_b
for the paper's rounds on DINOv2 with the head and optimiser of UniMatch V2; the share of labelled
images, 1_106 (100), 1_50 (212), 1_20 (529), 1_8 (1,323, the default), 1_4 (2,646), or voc: the
1,464 of VOC's own train list, with the images of SBD unlabelled. Except for voc, data.split_seed
draws the labelled images; published split lists go into data.labeled_list and data.unlabeled_list.
The data folder holds VOCdevkit and SBD's masks (docs/data.md).

Expected score and time: not measured. Lower bound of the time of the default on a TPU v5e:4x4 in
bfloat16: 0.09 hours, as planned from the compiled programs (docs/scaling.md).
"""

from ml_collections import ConfigDict

from configs import _arguments, _dinov2, default

BACKBONES = ("resnet101", "xception65", "dinov2_s", "dinov2_b")
LABELS = {"1_106": 100.0, "1_50": 212.0, "1_20": 529.0, "1_8": 1323.0, "1_4": 2646.0, "voc": 0.0}


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the paper's recipe with the backbone and share of labelled images in `arguments`."""
    kinds = ("resnet101", BACKBONES), ("1_8", LABELS)
    backbone, share = _arguments.choose(arguments, "configs/pascal_voc.py", *kinds)
    config = default.get_config()
    config.data.name = "pascal_voc"
    config.data.labels = LABELS[share]
    if share == "voc":
        config.data.labeled_list = "ImageSets/Segmentation/train.txt"
    if backbone.startswith("dinov2"):
        config.data.crop = (518, 518)
        return _dinov2.use(config, backbone[-1])
    config.data.crop = (513, 513)
    config.model.backbone = backbone
    return config
