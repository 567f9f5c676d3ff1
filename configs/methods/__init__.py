"""Recipes of published methods, with the data set as their argument; what they have in common."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import camvid, cityscapes, pascal_voc


def choose(argument: str, recipes: Mapping[str, Any], file: str) -> ConfigDict:
    """Returns the config of the recipe that the argument of a config file names.

    Args:
        argument: what follows the colon, such as "pascal_voc".
        recipes: functions that return a config, by name.
        file: path of the config file, for the error.

    Raises:
        ValueError: there is no such recipe.
    """
    if argument not in recipes:
        raise ValueError(
            f"the argument of {file} is {argument!r}: make it one of {', '.join(recipes)}"
        )
    return recipes[argument]()


def one_stage(config: ConfigDict, name: str, steps: int) -> ConfigDict:
    """Lets a method train one student from ImageNet weights, without a teacher before it.

    Args:
        config: of the data set; it is changed.
        name: of the method.
        steps: of the student.
    """
    config.method.name = name
    config.model.pretrained = "imagenet"
    config.rounds.count = 1
    config.rounds.student_init = "scratch"
    config.rounds.control = False
    config.train.teacher_steps = 0
    config.train.steps = steps
    return config


def on_pascal_voc(name: str, steps: int) -> ConfigDict:
    """A recipe on Pascal VOC, 1,464 of 10,582 images labelled, with DeepLabV3+ on ResNet-101."""
    return one_stage(pascal_voc.get_config("resnet101,voc"), name, steps)


def on_cityscapes(name: str, steps: int) -> ConfigDict:
    """A recipe on Cityscapes, 372 of 2,975 images labelled, with DeepLabV3+ on ResNet-101."""
    config = one_stage(cityscapes.get_config("1_8"), name, steps)
    config.model.backbone = "resnet101"
    return config


def on_camvid(name: str) -> ConfigDict:
    """A recipe for CamVid at half size, 12 of 367 images labelled, with the control.

    The published rates and crops are for other networks and images. Network, crop and rates are
    those of configs/camvid.py, and the steps are those of its teacher.
    """
    config = camvid.get_config("half")
    config = one_stage(config, name, config.train.teacher_steps)
    config.rounds.control = True
    return config


def adversarial(config: ConfigDict) -> ConfigDict:
    """Sets network and optimiser of AdvSemiSeg and S4GAN: DeepLabV2 on ResNet-101, and SGD.

    Args:
        config: of `on_pascal_voc` or `on_cityscapes`; it is changed.
    """
    config.model.head = "v2"
    config.model.output_stride = 8
    config.optim.student.learning_rate = 2.5e-4
    config.optim.student.head_multiplier = 10.0
    config.optim.weight_decay = 5e-4
    return config
