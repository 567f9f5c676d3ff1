"""The dtype of computations that bfloat16 would spoil."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x in float32, or in float64 if it is float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
