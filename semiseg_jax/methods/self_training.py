"""Self-training, the paper's method: labels are made by a teacher before each student is trained.

Source: Yuan et al., ICCV 2021, Algorithm 1. The labels are `semiseg_jax.pseudo_labels`, the loss is
`train_step.LossSums`, and the streams of weak and strong images are `config.data`.
"""

import dataclasses
from typing import Any

from semiseg_jax.methods.method import Method
from semiseg_jax.runtime import rules


@dataclasses.dataclass(frozen=True)
class SelfTraining(Method):
    """A student learns from pseudo-labels in files; the step has no state of its own."""


RULES: dict[str, rules.Rule] = {}

DEFAULTS: dict[str, Any] = {}
