"""UniMatch V2 (Yang et al., TPAMI 2025): its recipes on DINOv2 with a DPT head, and one on CamVid.

    python -m semiseg_jax.main --config=configs/methods/unimatch_v2.py:pascal_voc_s
    python -m semiseg_jax.main --config=configs/methods/unimatch_v2.py:pascal_voc_b
    python -m semiseg_jax.main --config=configs/methods/unimatch_v2.py:cityscapes_s
    python -m semiseg_jax.main --config=configs/methods/unimatch_v2.py:cityscapes_b
    python -m semiseg_jax.main --config=configs/methods/unimatch_v2.py:camvid

The last letter is the size of the backbone, DINOv2-S or DINOv2-B. Steps are the published epochs
over the unlabelled images. The authors published, as mIoU in %, 87.9 (S) and 90.8 (B) for Pascal
VOC with 1,464 labels and 81.9 (S) and 84.3 (B) for Cityscapes with 372, of the epoch that was best
on the reported images; here the last step is reported. Our score and time: not measured. The
recipe on CamVid is on the network of configs/camvid.py; its score and time: not measured.
"""

import functools

from ml_collections import ConfigDict

from configs import _dinov2, methods


def get_config(argument: str = "pascal_voc_s") -> ConfigDict:
    """Returns the recipe on a data set, with the backbone's size where there are two."""
    recipes = {"camvid": lambda: methods.on_camvid("unimatch_v2")}
    for size in ("s", "b"):
        recipes[f"pascal_voc_{size}"] = functools.partial(pascal_voc, size)
        recipes[f"cityscapes_{size}"] = functools.partial(cityscapes, size)
    return methods.choose(argument, recipes, "configs/methods/unimatch_v2.py")


def pascal_voc(size: str) -> ConfigDict:
    """60 epochs of 9,118 unlabelled images, 16 in a step; crop 518."""
    config = methods.on_pascal_voc("unimatch_v2", 34_200)
    _dinov2.use(config, size)
    config.data.crop = (518, 518)
    return config


def cityscapes(size: str) -> ConfigDict:
    """180 epochs of 2,603 unlabelled images, 8 in a step; crop 798, hard labelled pixels."""
    config = methods.on_cityscapes("unimatch_v2", 58_600)
    _dinov2.use(config, size)
    config.data.crop = config.eval.window = (798, 798)
    # Two thirds of the window.
    config.eval.window_stride = (532, 532)
    config.train.batch_labeled = config.train.batch_unlabeled = 8
    config.loss.labeled = "ohem"
    return config
