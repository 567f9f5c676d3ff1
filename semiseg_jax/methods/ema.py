"""Exponential moving averages (EMA) of a network: parameters and norm statistics.

Sources: Tarvainen and Valpola, "Mean teachers", NeurIPS 2017; the laws of the decay are those of
the published code of UniMatch V2 (`unimatch_v2.py`), ClassMix (`trainSSL.py`) and French et al.
2019 (`optim_weight_ema.py`).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from semiseg_jax.methods.precision import at_least_float32, step_as_float

# What happens to the norm statistics of the averaged network: averaged like the parameters
# (UniMatch V2, French et al.), copied from the network that is trained, or left as they are
# (ClassMix, whose teacher runs in training mode and so moves its own).
StatisticsRule = Literal["average", "copy", "keep"]


def init_average(variables: Any) -> Any:
    """Starts an average at the values of a tree: a copy, at least float32.

    In bfloat16 an average would stand still: 1 + .004 * .1 is 1 there.

    Args:
        variables: parameters or statistics, arrays of any dtype; integers keep theirs.
    """

    def start(leaf: ArrayLike) -> Array:
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = at_least_float32(leaf)
        return jnp.array(leaf)

    return jax.tree.map(start, variables)


def update_weight(
    step: Integer[ArrayLike, ""], decay: float, warmup: bool = True
) -> Float[Array, ""]:
    """Weight of the new values in an update, 1 - decay_t, in float32 (float64 under x64).

    With warm-up, decay_t = min(1 - 1 / (t + 1), decay): the first update copies, and the average is
    the mean of all values so far until `decay` is reached (UniMatch V2, ClassMix). Without, it is
    `decay` from the first step (French et al.).

    Args:
        step: t, the number of updates before this one, from 0.
        decay: in 0..1.
        warmup: whether the decay starts at 0.
    """
    step = step_as_float(step)
    # 1 - decay is taken in Python's float64, where .996 loses no digit that float32 has.
    weight = jnp.asarray(1 - decay, step.dtype)
    if not warmup:
        return weight
    return jnp.maximum(1 / (step + 1), weight)


def update_average(average: Any, current: Any, weight: Float[ArrayLike, ""]) -> Any:
    """Moves each array of an average towards its current value; integers are copied.

    average + weight * (current - average), computed in the dtype of the average. The result is
    `current` to the bit at weight 1, and `average` to the bit where both are equal.

    Args:
        average: from `init_average`.
        current: the same tree.
        weight: from `update_weight`, in 0..1.
    """

    def move(old: Array, new: ArrayLike) -> Array:
        new = jnp.asarray(new, old.dtype)
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new
        share = jnp.asarray(weight, old.dtype)
        difference = new - old
        # From the nearer end, so that both ends are met exactly.
        return jnp.where(share < 0.5, old + share * difference, new - (1 - share) * difference)

    return jax.tree.map(move, average, current)


def update(
    average: Any, new: Any, step: Integer[ArrayLike, ""], decay: float, warmup: bool = True
) -> Any:
    """Moves an average towards new values: decay_t * average + (1 - decay_t) * new.

    Args:
        average: from `init_average`.
        new: the same tree.
        step, decay, warmup: as for `update_weight`, which has decay_t.
    """
    return update_average(average, new, update_weight(step, decay, warmup))


def update_statistics(
    average: Any, current: Any, weight: Float[ArrayLike, ""], rule: StatisticsRule = "average"
) -> Any:
    """Updates the norm statistics of an averaged network.

    Args:
        average: from `init_average`.
        current: statistics of the network that is trained, the same tree.
        weight: from `update_weight`.
        rule: see `StatisticsRule`.
    """
    match rule:
        case "average":
            return update_average(average, current, weight)
        case "copy":
            return update_average(average, current, 1.0)
        case "keep":
            return average
