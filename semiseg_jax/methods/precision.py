"""The dtypes of the building blocks.

The rule: what bfloat16 would spoil (softmax, confidence, averages, losses, perturbations) is
float32, or float64 for float64 inputs. Factors that depend on the step alone are float32, or
float64 under x64. Random numbers are float32 and int32 under x64 too, so that both draw the same.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x in float32, or in float64 if it is float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def step_as_float(step: ArrayLike) -> Float[Array, ""]:
    """Returns the number of a step in float32, or in float64 under x64."""
    return jnp.asarray(step, jnp.promote_types(jnp.float32, jnp.result_type(float)))
