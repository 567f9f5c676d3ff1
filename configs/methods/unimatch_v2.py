"""UniMatch V2 (Yang et al., TPAMI 2025) on the networks of this project.

    python -m semiseg_jax.main --config=configs/methods/unimatch_v2.py:camvid

The published recipe trains DINOv2 with a DPT head, which this project does not have. Expected score
and time: not measured.
"""

from ml_collections import ConfigDict

from configs import methods


def get_config(argument: str = "camvid") -> ConfigDict:
    """Returns the recipe on a data set."""
    recipes = {"camvid": lambda: methods.on_camvid("unimatch_v2")}
    return methods.choose(argument, recipes, "configs/methods/unimatch_v2.py")
