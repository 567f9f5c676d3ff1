"""Pixel losses: cross-entropy, and losses that tolerate wrong pseudo-labels.

Each public loss returns `(sum, count)`: the sum over the valid pixels and the number of valid
pixels, so that the caller divides once, over the global batch. Each `*_map` function returns the
loss of every pixel.

Sources: self-correction loss (SCL), Yuan et al., ICCV 2021, section 2.3, equations 4 and 5;
symmetric cross-entropy (SCE), Wang et al., ICCV 2019.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

# The label of pixels without a class; losses and metrics skip them. The constant is defined in this
# module because importing anything below `semiseg_jax.data` imports TensorFlow.
IGNORE = 255

# The released code sets w to 1 above this confidence.
SATURATION_THRESHOLD = 0.8


@dataclasses.dataclass(frozen=True)
class PixelTerms:
    """The softmax terms from which every loss is computed; arrays of one shape [...].

    All terms are exact to float32 rounding even where the network is certain: `1 - p` is never
    formed by subtracting a softmax value near 1 from 1.
    """

    cross_entropy: Float[Array, "*pixels"]  # -log p_y, in nats
    miss: Float[Array, "*pixels"]  # 1 - p_y
    confidence: Float[Array, "*pixels"]  # max over classes of p
    valid: Bool[Array, "*pixels"]


def pixel_terms(
    logits: Float[ArrayLike, "*pixels classes"],
    labels: Integer[ArrayLike, "*pixels"],
    ignore: int = IGNORE,
) -> PixelTerms:
    """Computes the softmax terms of each pixel, in float32 (float64 for float64 logits).

    With a = arg max of the logits and s = the sum over all k except a of exp(l_k - l_a), the
    softmax is p_a = 1 / (1 + s). Storing s separately from the 1 preserves the digits that a plain
    log-softmax loses when s is small.

    Args:
        logits: class scores of any float dtype.
        labels: class ids, or `ignore`.
        ignore: label of the pixels that are not valid.
    """
    logits = jnp.asarray(logits)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    classes = jnp.arange(logits.shape[-1])
    labels = jnp.asarray(labels, jnp.int32)  # uint8 cannot be compared with a negative `ignore`
    valid = labels != ignore
    # Ignored pixels get an existing label, so that every term below is defined for them.
    target = jnp.where(valid, labels, 0)[..., None] == classes
    top = jnp.argmax(logits, axis=-1)[..., None] == classes
    # Selecting by mask rather than jnp.max: the gradient goes to one class even at a tie.
    top_logit = jnp.sum(jnp.where(top, logits, 0), axis=-1)
    target_logit = jnp.sum(jnp.where(target, logits, 0), axis=-1)
    others = jnp.sum(jnp.where(top, 0, jnp.exp(logits - top_logit[..., None])), axis=-1)
    target_is_top = jnp.any(target & top, axis=-1)
    missed = jnp.where(target_is_top, others, 1 + others - jnp.exp(target_logit - top_logit))
    return PixelTerms(
        cross_entropy=(top_logit - target_logit) + jnp.log1p(others),
        miss=missed / (1 + others),
        confidence=1 / (1 + others),
        valid=valid,
    )


def reverse_cross_entropy_map(
    terms: PixelTerms, label_floor: float = 1e-4
) -> Float[Array, "*pixels"]:
    """RCE of each pixel: -sum_k p_k log q_k with the one-hot q floored at `label_floor`.

    log q is 0 at the label and log(floor) elsewhere, hence -log(floor) * (1 - p_y).
    Source: ICCV 2021, second term of equation 4, with the minus that the paper omits.
    """
    return -math.log(label_floor) * terms.miss


def self_correction_map(
    terms: PixelTerms,
    direction: Literal["paper", "official"] = "paper",
    stop_gradient: bool = True,
    label_floor: float = 1e-4,
    saturate: bool | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Float[Array, "*pixels"]:
    """SCL of each pixel: w * alpha * CE + (1 - w) * beta * RCE (ICCV 2021, equations 4 and 5).

    Args:
        terms: from `pixel_terms`.
        direction: "paper", or "official" for the released code's (1 - w) * CE + w * RCE.
        stop_gradient: treat w, the largest softmax value, as a constant.
        label_floor: floor of the one-hot label inside the logarithm.
        saturate: set w to 1 above .8; None saturates only for "official", as in the released code.
        alpha: weight of CE.
        beta: weight of RCE.
    """
    weight = terms.confidence
    if stop_gradient:
        weight = jax.lax.stop_gradient(weight)
    if saturate if saturate is not None else direction == "official":
        weight = jnp.where(weight > SATURATION_THRESHOLD, 1.0, weight)
    if direction == "official":
        weight = 1 - weight
    reverse = reverse_cross_entropy_map(terms, label_floor)
    return weight * alpha * terms.cross_entropy + (1 - weight) * beta * reverse


def symmetric_cross_entropy_map(
    terms: PixelTerms, label_floor: float = 1e-4, alpha: float = 1.0, beta: float = 1.0
) -> Float[Array, "*pixels"]:
    """SCE of each pixel: alpha * CE + beta * RCE (Wang et al., ICCV 2019, equation 7)."""
    reverse = reverse_cross_entropy_map(terms, label_floor)
    return alpha * terms.cross_entropy + beta * reverse


def masked_sum(
    values: Float[Array, "*pixels"], mask: Bool[Array, "*pixels"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the sum of `values` where `mask` is true, and the number of such pixels.

    Both are 0 for an empty mask. The count is a float because a global batch can hold more pixels
    than int32 counts safely, and the count serves only as a divisor.
    """
    return jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask, dtype=values.dtype)


def cross_entropy(
    logits: Float[ArrayLike, "*pixels classes"],
    labels: Integer[ArrayLike, "*pixels"],
    ignore: int = IGNORE,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Softmax cross-entropy over the valid pixels, as (sum in nats, count).

    The reduction is in float32 for every dtype of the logits (in float64 for float64).
    """
    terms = pixel_terms(logits, labels, ignore)
    return masked_sum(terms.cross_entropy, terms.valid)


def self_correction(
    logits: Float[ArrayLike, "*pixels classes"],
    labels: Integer[ArrayLike, "*pixels"],
    ignore: int = IGNORE,
    **kwargs,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Self-correction loss over the valid pixels, as (sum, count).

    `kwargs` go to `self_correction_map`: direction, stop_gradient, label_floor, saturate, alpha,
    beta. Source: Yuan et al., ICCV 2021, equations 4 and 5, with the minus that equation 4 omits.
    """
    terms = pixel_terms(logits, labels, ignore)
    return masked_sum(self_correction_map(terms, **kwargs), terms.valid)


def symmetric_cross_entropy(
    logits: Float[ArrayLike, "*pixels classes"],
    labels: Integer[ArrayLike, "*pixels"],
    ignore: int = IGNORE,
    **kwargs,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Symmetric cross-entropy over the valid pixels, as (sum, count).

    `kwargs` go to `symmetric_cross_entropy_map`: label_floor, alpha, beta.
    """
    terms = pixel_terms(logits, labels, ignore)
    return masked_sum(symmetric_cross_entropy_map(terms, **kwargs), terms.valid)
