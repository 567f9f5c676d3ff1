"""UniMatch (Yang et al., CVPR 2023), the published methods.

    python -m semiseg_jax.main --config=configs/methods/unimatch.py:pascal_voc
    python -m semiseg_jax.main --config=configs/methods/unimatch.py:cityscapes
    python -m semiseg_jax.main --config=configs/methods/unimatch.py:camvid

Expected score and time: not measured. Steps are the published epochs over the unlabelled images.
"""

from ml_collections import ConfigDict

from configs import methods


def get_config(argument: str = "pascal_voc") -> ConfigDict:
    """Returns the recipe on a data set."""
    recipes = {"pascal_voc": pascal_voc, "cityscapes": cityscapes, "camvid": camvid}
    return methods.choose(argument, recipes, "configs/methods/unimatch.py")


def pascal_voc(name: str = "unimatch") -> ConfigDict:
    """80 epochs of 9,118 unlabelled images, 8 in a step; crop 321."""
    config = methods.on_pascal_voc(name, 91_200)
    config.data.crop = (321, 321)
    config.optim.student.learning_rate = 0.001
    config.optim.student.head_multiplier = 10.0
    config.train.batch_labeled = config.train.batch_unlabeled = 8
    return config


def cityscapes(name: str = "unimatch") -> ConfigDict:
    """240 epochs of 2,603 unlabelled images, 8 in a step; crop 801, hard labelled pixels."""
    config = methods.on_cityscapes(name, 78_100)
    config.data.crop = (801, 801)
    config.optim.student.learning_rate = 0.005
    config.optim.student.head_multiplier = 1.0
    config.train.batch_labeled = config.train.batch_unlabeled = 8
    # The published code keeps at least 200,000 pixels of two crops: a sixth.
    config.loss.labeled = "ohem"
    config.method[name].threshold = 0.0
    return config


def camvid(name: str = "unimatch") -> ConfigDict:
    """See `methods.on_camvid`."""
    return methods.on_camvid(name)
