"""AdvSemiSeg (Hung et al., BMVC 2018), the published method.

    python -m semiseg_jax.main --config=configs/methods/advsemiseg.py:pascal_voc
    python -m semiseg_jax.main --config=configs/methods/advsemiseg.py:cityscapes
    python -m semiseg_jax.main --config=configs/methods/advsemiseg.py:camvid

The authors start from weights trained on COCO, here it is ImageNet. Expected score and time: not
measured.
"""

from ml_collections import ConfigDict

from configs import methods


def get_config(argument: str = "pascal_voc") -> ConfigDict:
    """Returns the recipe on a data set."""
    recipes = {"pascal_voc": pascal_voc, "cityscapes": cityscapes, "camvid": camvid}
    return methods.choose(argument, recipes, "configs/methods/advsemiseg.py")


def pascal_voc() -> ConfigDict:
    """20,000 steps of 10 + 10 images; crop 321."""
    config = methods.adversarial(methods.on_pascal_voc("advsemiseg", 20_000))
    config.data.crop = (321, 321)
    config.train.batch_labeled = config.train.batch_unlabeled = 10
    return config


def cityscapes() -> ConfigDict:
    """40,000 steps of 2 + 2 whole images at half size; self-training from step 5,000.

    The published code runs Pascal VOC alone. These settings were not checked against the paper.
    """
    config = methods.adversarial(methods.on_cityscapes("advsemiseg", 40_000))
    config.data.downscale = 2
    config.data.crop = (512, 1024)
    config.data.scale = (1.0, 1.0)
    config.method.advsemiseg.start = 0.125
    config.train.batch_labeled = config.train.batch_unlabeled = 2
    return config


def camvid() -> ConfigDict:
    """See `methods.on_camvid`."""
    return methods.on_camvid("advsemiseg")
