"""S4GAN (Mittal et al., TPAMI 2021), the published method without its classifier of images (MLMT).

    python -m semiseg_jax.main --config=configs/methods/s4gan.py:pascal_voc
    python -m semiseg_jax.main --config=configs/methods/s4gan.py:cityscapes
    python -m semiseg_jax.main --config=configs/methods/s4gan.py:camvid

Expected score and time: not measured.
"""

from ml_collections import ConfigDict

from configs import methods


def get_config(argument: str = "pascal_voc") -> ConfigDict:
    """Returns the recipe on a data set."""
    recipes = {"pascal_voc": pascal_voc, "cityscapes": cityscapes, "camvid": camvid}
    return methods.choose(argument, recipes, "configs/methods/s4gan.py")


def pascal_voc() -> ConfigDict:
    """40,000 steps of 8 + 8 images; crop 321."""
    config = methods.adversarial(methods.on_pascal_voc("s4gan", 40_000))
    config.data.crop = (321, 321)
    config.train.batch_labeled = config.train.batch_unlabeled = 8
    return config


def cityscapes() -> ConfigDict:
    """40,000 steps of 8 + 8 images; crop 256x512 at full resolution, never scaled."""
    config = methods.adversarial(methods.on_cityscapes("s4gan", 40_000))
    config.data.crop = (256, 512)
    config.data.scale = (1.0, 1.0)
    config.train.batch_labeled = config.train.batch_unlabeled = 8
    config.method.s4gan.threshold = 0.7
    config.method.s4gan.discriminator_rate = 1e-5
    return config


def camvid() -> ConfigDict:
    """See `methods.on_camvid`."""
    return methods.on_camvid("s4gan")
