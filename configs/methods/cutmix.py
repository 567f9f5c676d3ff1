"""CutMix-Seg (French et al., BMVC 2020), the published methods.

    python -m semiseg_jax.main --config=configs/methods/cutmix.py:pascal_voc
    python -m semiseg_jax.main --config=configs/methods/cutmix.py:cityscapes
    python -m semiseg_jax.main --config=configs/methods/cutmix.py:camvid

Twice as many unlabelled images as mixed ones are read: two make one. Expected score and time: not
measured.
"""

from ml_collections import ConfigDict

from configs import methods


def get_config(argument: str = "pascal_voc") -> ConfigDict:
    """Returns the recipe on a data set."""
    recipes = {"pascal_voc": pascal_voc, "cityscapes": cityscapes, "camvid": camvid}
    return methods.choose(argument, recipes, "configs/methods/cutmix.py")


def pascal_voc() -> ConfigDict:
    """40,000 steps of 10 labelled and 10 mixed images; crop 321."""
    config = _published(methods.on_pascal_voc("cutmix", 40_000))
    config.data.crop = (321, 321)
    config.train.batch_labeled, config.train.batch_unlabeled = 10, 20
    return config


def cityscapes() -> ConfigDict:
    """40,000 steps of 4 labelled and 4 mixed images; crop 256x512 of images at half size."""
    config = _published(methods.on_cityscapes("cutmix", 40_000))
    config.data.downscale = 2
    config.data.crop = (256, 512)
    config.train.batch_labeled, config.train.batch_unlabeled = 4, 8
    return config


def camvid() -> ConfigDict:
    """See `methods.on_camvid`."""
    config = methods.on_camvid("cutmix")
    config.train.batch_unlabeled = 16
    return config


def _published(config: ConfigDict) -> ConfigDict:
    """DeepLabV2 with frozen norms, Adam at a constant rate without decay; the strong colours."""
    config.model.head = "v2"
    config.model.output_stride = 8
    config.model.norm = "frozen"
    config.optim.kind = "adam"
    config.optim.student.learning_rate = 3e-6
    config.optim.student.head_multiplier = 10.0
    config.optim.poly_power = 0.0
    config.optim.weight_decay = 0.0
    config.method.cutmix.divide_by = "all"
    config.method.views.jitter = (0.4, 0.4, 0.4, 0.1)
    config.method.views.blur_probability = 0.0
    return config
