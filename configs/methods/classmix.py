"""ClassMix (Olsson et al., WACV 2021), the published methods.

    python -m semiseg_jax.main --config=configs/methods/classmix.py:cityscapes
    python -m semiseg_jax.main --config=configs/methods/classmix.py:pascal_voc
    python -m semiseg_jax.main --config=configs/methods/classmix.py:camvid

The authors start from weights trained on COCO, here it is ImageNet. Expected score and time: not
measured.
"""

from ml_collections import ConfigDict

from configs import methods


def get_config(argument: str = "cityscapes") -> ConfigDict:
    """Returns the recipe on a data set."""
    recipes = {"cityscapes": cityscapes, "pascal_voc": pascal_voc, "camvid": camvid}
    return methods.choose(argument, recipes, "configs/methods/classmix.py")


def cityscapes() -> ConfigDict:
    """40,000 steps of 2 + 2 images; crop 512x512 of images at half size, one jitter for a batch."""
    config = _published(methods.on_cityscapes("classmix", 40_000))
    config.data.downscale = 2
    config.data.crop = (512, 512)
    config.train.batch_labeled = config.train.batch_unlabeled = 2
    config.method.views.jitter = (0.25, 0.25, 0.25, 0.25)
    config.method.views.grey_probability = 0.0
    config.method.views.blur_sigma = (0.15, 1.15)
    config.method.views.per_batch = True
    return config


def pascal_voc() -> ConfigDict:
    """40,000 steps of 10 + 10 images; crop 321, no change of colour."""
    config = _published(methods.on_pascal_voc("classmix", 40_000))
    config.data.crop = (321, 321)
    config.train.batch_labeled = config.train.batch_unlabeled = 10
    config.method.views.jitter_probability = 0.0
    config.method.views.grey_probability = 0.0
    config.method.views.blur_probability = 0.0
    return config


def camvid() -> ConfigDict:
    """See `methods.on_camvid`."""
    return methods.on_camvid("classmix")


def _published(config: ConfigDict) -> ConfigDict:
    """DeepLabV2; a teacher in training mode, without averaged statistics; the student counts."""
    config.model.head = "v2"
    config.model.output_stride = 8
    config.optim.student.learning_rate = 2.5e-4
    config.optim.student.head_multiplier = 10.0
    config.optim.weight_decay = 5e-4
    config.method.classmix.teacher_mode = "train"
    config.method.classmix.statistics = "keep"
    config.method.classmix.report = "student"
    config.method.classmix.divide_by = "all"
    return config
