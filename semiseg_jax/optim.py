"""SGD with momentum, the poly schedule, and which parameter gets which rate and decay."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

# First match wins; every parameter must match. (pattern, group, decayed)
RULES = (
    (r"^backbone/.*/kernel$", "backbone", True),
    (r"^backbone/.*/(scale|bias)$", "backbone", False),
    (r".*/kernel$", "head", True),
    (r".*/(scale|bias)$", "head", False),
)


def poly(learning_rate: float, steps: int, power: float) -> Callable[[jax.Array], jax.Array]:
    """learning_rate * (1 - step / steps) ^ power, 0 from the last step on.

    Source: DeepLab (Chen et al., 2017), section 4.1.
    """
    return optax.polynomial_schedule(learning_rate, 0.0, power, steps)


def rule_of(path: str) -> tuple[str, bool]:
    """(group, decayed) of the parameter at a path such as "backbone/stem/conv/kernel".

    Raises:
        ValueError: no rule covers it.
    """
    for pattern, group, decayed in RULES:
        if re.match(pattern, path):
            return group, decayed
    raise ValueError(f"No rule of optim.RULES covers the parameter {path}: add one.")


def _by_rule(params: Any, value: Callable[[str, bool], Any]) -> Any:
    """A tree like `params` with value(group, decayed) at each leaf."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({k: value(*rule_of(k)) for k in flat}, sep="/")


def table(params: Any) -> str:
    """For the log: how many tensors and numbers each rule covers."""
    totals: dict[tuple[str, bool], list[int]] = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        total = totals.setdefault(rule_of(path), [0, 0])
        total[0] += 1
        total[1] += leaf.size
    return "\n".join(
        f"  {group:8s} {'decayed' if decayed else 'not decayed':11s} {tensors:4d} tensors "
        f"{numbers:12,d} numbers"
        for (group, decayed), (tensors, numbers) in sorted(totals.items())
    )


def rate_factor(config: Any) -> float:
    """What learning rates are multiplied by for another batch than `optim.reference_batch`.

    Source: the linear rule, Goyal et al., 2017, section 2.1.
    """
    reference = config.optim.reference_batch
    return config.train.batch_labeled / reference if reference else 1.0


def make_optimizer(
    optim_config: Any, stage: str, steps: int, factor: float = 1.0
) -> tuple[optax.GradientTransformation, Callable[[jax.Array], jax.Array]]:
    """The optimiser of a stage, and the schedule of its backbone's learning rate.

    As in PyTorch's SGD: decay is added to the gradient before the momentum, the rate applied
    after.

    Args:
        optim_config: `config.optim`.
        stage: "teacher", "student" or "control" (which has the student's rates).
        steps: of the stage.
        factor: on the learning rates, from `rate_factor`.
    """
    rates = optim_config.teacher if stage == "teacher" else optim_config.student
    schedule = poly(factor * rates.learning_rate, steps, optim_config.poly_power)

    def multiply_head(updates: optax.Updates) -> optax.Updates:
        factors = _by_rule(
            updates, lambda group, _: rates.head_multiplier if group == "head" else 1.0
        )
        return jax.tree.map(jnp.multiply, updates, factors)

    return (
        optax.chain(
            optax.add_decayed_weights(
                optim_config.weight_decay,
                mask=lambda params: _by_rule(params, lambda _, decayed: decayed),
            ),
            optax.trace(optim_config.momentum),
            optax.stateless(lambda updates, _: multiply_head(updates)),
            optax.scale_by_learning_rate(schedule),
        ),
        schedule,
    )
