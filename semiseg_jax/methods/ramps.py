"""Ramps: the factor that brings in the weight of an unlabelled loss over the first steps.

Sources: Laine and Aila, "Temporal ensembling", ICLR 2017 (the sigmoid-shaped ramp); the other
shapes are those of CCT's published code (`utils/ramps.py`).
"""

from typing import Literal

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from semiseg_jax.methods.precision import step_as_float

RampShape = Literal["sigmoid", "linear", "cosine", "log", "exp"]


def ramp(
    step: ArrayLike, length: float, start: float = 0, shape: RampShape = "sigmoid"
) -> Float[Array, ""]:
    """Returns the factor of a step: 0 before `start`, and 1 from `start + length` on, or nearly.

    With t = (step - start) / length, clipped to 0..1:

        sigmoid    exp(-5 (1 - t)^2); begins at exp(-5) = .0067 (CCT, section 3.2; ClassMix)
        linear     t
        cosine     (1 - cos(pi t)) / 2
        log        1 - exp(-5 t); ends at .9933
        exp        exp(5 (t - 1)); begins at .0067

    Args:
        step: number of updates before this one, or the epoch; [].
        length: of the ramp, in the unit of `step`; 0 for none.
        start: of the ramp, in the same unit.
        shape: see above.
    """
    step = step_as_float(step)
    if length == 0:
        return jnp.where(step < start, 0, jnp.ones((), step.dtype))
    t = jnp.clip((step - start) / length, 0, 1)
    match shape:
        case "sigmoid":
            factor = jnp.exp(-5 * (1 - t) ** 2)
        case "linear":
            factor = t
        case "cosine":
            factor = (1 - jnp.cos(jnp.pi * t)) / 2
        case "log":
            factor = -jnp.expm1(-5 * t)
        case "exp":
            factor = jnp.exp(5 * (t - 1))
    return jnp.where(step < start, 0, factor)
