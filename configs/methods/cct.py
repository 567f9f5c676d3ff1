"""Cross-consistency training (Ouali et al., CVPR 2020), the published methods.

    python -m semiseg_jax.main --config=configs/methods/cct.py:pascal_voc
    python -m semiseg_jax.main --config=configs/methods/cct.py:camvid

The published network is PSPNet with a small main decoder; here it is DeepLabV3+ on the same
backbone. Expected score and time: not measured.
"""

from ml_collections import ConfigDict

from configs import methods


def get_config(argument: str = "pascal_voc") -> ConfigDict:
    """Returns the recipe on a data set."""
    recipes = {"pascal_voc": pascal_voc, "camvid": camvid}
    return methods.choose(argument, recipes, "configs/methods/cct.py")


def pascal_voc() -> ConfigDict:
    """80 epochs of 9,118 unlabelled images, 10 in a step; crop 320, stride 8."""
    config = methods.on_pascal_voc("cct", 73_000)
    config.data.crop = (320, 320)
    config.model.backbone = "resnet50"
    config.model.output_stride = 8
    config.optim.student.learning_rate = 0.001
    config.optim.student.head_multiplier = 10.0
    config.train.batch_labeled = config.train.batch_unlabeled = 10
    return config


def camvid() -> ConfigDict:
    """See `methods.on_camvid`; the most frequent class, road or building, is the background."""
    config = methods.on_camvid("cct")
    config.method.cct.background = -1
    return config
