"""The methods by name, `method.name` of the config."""

from types import ModuleType
from typing import Any

from semiseg_jax.methods import (
    advsemiseg,
    cct,
    classmix,
    cutmix,
    fixmatch,
    pseudoseg,
    s4gan,
    self_training,
    unimatch,
    unimatch_v2,
)
from semiseg_jax.methods.method import Method
from semiseg_jax.runtime.rules import Rule

# By name: the module, which has the rules and defaults of its keys, and the class.
_OWN: dict[str, tuple[ModuleType, type[Method]]] = {
    "self_training": (self_training, self_training.SelfTraining),
    "fixmatch": (fixmatch, fixmatch.FixMatch),
    "cutmix": (cutmix, cutmix.CutMix),
    "classmix": (classmix, classmix.ClassMix),
    "unimatch": (unimatch, unimatch.UniMatch),
    "unimatch_v2": (unimatch_v2, unimatch_v2.UniMatchV2),
    "cct": (cct, cct.CrossConsistency),
    "pseudoseg": (pseudoseg, pseudoseg.PseudoSeg),
    "advsemiseg": (advsemiseg, advsemiseg.AdvSemiSeg),
    "s4gan": (s4gan, s4gan.S4GAN),
}

# By name: the class, whose fields are the keys of config.method.NAME.
METHODS: dict[str, type[Method]] = {name: method for name, (_, method) in _OWN.items()}

# By key of the config: the constraint of its values.
RULES: dict[str, Rule] = {
    f"method.{name}.{key}": rule
    for name, (module, _) in _OWN.items()
    for key, rule in module.RULES.items()
}

# By key of the config: the value in workdirs of older code.
DEFAULTS: dict[str, Any] = {
    f"method.{name}.{key}": value
    for name, (module, _) in _OWN.items()
    for key, value in module.DEFAULTS.items()
}


def build(config: Any) -> Method:
    """Returns the method of a config.

    Args:
        config: the whole config; `method` is read.
    """
    name = config.method.name
    return METHODS[name].from_config(config, name)
