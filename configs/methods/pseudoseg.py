"""PseudoSeg (Zou et al., ICLR 2021), the published methods.

    python -m semiseg_jax.main --config=configs/methods/pseudoseg.py:pascal_voc
    python -m semiseg_jax.main --config=configs/methods/pseudoseg.py:camvid

Expected score and time: not measured.
"""

from ml_collections import ConfigDict

from configs import methods


def get_config(argument: str = "pascal_voc") -> ConfigDict:
    """Returns the recipe on a data set."""
    recipes = {"pascal_voc": pascal_voc, "camvid": camvid}
    return methods.choose(argument, recipes, "configs/methods/pseudoseg.py")


def pascal_voc() -> ConfigDict:
    """30,000 steps of 64 + 64 images; crop 513, Xception-65."""
    config = methods.on_pascal_voc("pseudoseg", 30_000)
    config.data.crop = (513, 513)
    config.model.backbone = "xception65"
    config.optim.student.learning_rate = 0.007
    config.optim.student.head_multiplier = 1.0
    config.optim.weight_decay = 4e-5
    config.train.batch_labeled = config.train.batch_unlabeled = 64
    config.method.views.jitter_probability = 1.0
    config.method.views.grey_probability = 0.0
    config.method.views.blur_probability = 0.0
    config.method.pseudoseg.classifier_dropout = 0.5
    return config


def camvid() -> ConfigDict:
    """See `methods.on_camvid`; CamVid has no background class, and its crops are smaller."""
    config = methods.on_camvid("pseudoseg")
    config.method.pseudoseg.has_background = False
    config.method.pseudoseg.cutout = 32
    return config
