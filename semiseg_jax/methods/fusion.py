"""Soft pseudo-labels of two fused predictions (PseudoSeg).

The computation is in float32 for logits of any dtype (float64 for float64).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from semiseg_jax import losses
from semiseg_jax.methods.precision import at_least_float32


def calibrated_fusion(
    decoder_logits: Float[Array, "n h w classes"],
    attention_logits: Float[Array, "n h w classes"],
    valid: Bool[Array, "n h w"] | None = None,
    temperature: float = 0.5,
) -> Float[Array, "n h w classes"]:
    """Fuses two predictions of the weak view into soft pseudo-labels (PseudoSeg).

    Both logits are divided by their joint root mean square; the two softmaxes are averaged and
    sharpened: p^(1 / T), scaled to sum 1. Source: Zou et al., ICLR 2021, equations 4 and 5;
    googleinterns/wss, train_wss.py, flags `logit_norm`, `pseudo_src=avg` and `temperature`. As in
    the code, the root mean square is one number; it is over the global batch, which in the code
    is the batch of one GPU, padding included. The paper writes a norm for each pixel.

    Args:
        decoder_logits: of the segmentation network.
        attention_logits: of the refined Grad-CAM, at the same size.
        valid: pixels that are not padding; the root mean square is over them.
        temperature: T; 1 does not sharpen.

    Returns:
        Probabilities, without gradient.
    """
    both = jnp.stack([at_least_float32(decoder_logits), at_least_float32(attention_logits)])
    both = jax.lax.stop_gradient(both)
    # Mean over the classes first: the sum over pixels of a large batch stays in range and digits.
    squares = jnp.mean(both**2, axis=(0, -1))
    total, count = losses.masked_sum(
        squares, jnp.ones_like(squares, bool) if valid is None else valid
    )
    scaled = both * jax.lax.rsqrt(total / jnp.maximum(count, 1) + 1e-8)
    probabilities = jnp.mean(jax.nn.softmax(scaled, axis=-1), axis=0)
    sharpened = probabilities ** (1 / temperature)
    return sharpened / jnp.sum(sharpened, axis=-1, keepdims=True)
