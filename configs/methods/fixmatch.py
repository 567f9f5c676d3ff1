"""FixMatch for segmentation, by the recipe that UniMatch (Yang et al., CVPR 2023) published for it.

    python -m semiseg_jax.main --config=configs/methods/fixmatch.py:pascal_voc
    python -m semiseg_jax.main --config=configs/methods/fixmatch.py:cityscapes
    python -m semiseg_jax.main --config=configs/methods/fixmatch.py:camvid

Expected score and time: not measured.
"""

from ml_collections import ConfigDict

from configs import methods
from configs.methods import unimatch


def get_config(argument: str = "pascal_voc") -> ConfigDict:
    """Returns the recipe on a data set: that of UniMatch."""
    recipes = {
        "pascal_voc": lambda: unimatch.pascal_voc("fixmatch"),
        "cityscapes": lambda: unimatch.cityscapes("fixmatch"),
        "camvid": lambda: unimatch.camvid("fixmatch"),
    }
    return methods.choose(argument, recipes, "configs/methods/fixmatch.py")
