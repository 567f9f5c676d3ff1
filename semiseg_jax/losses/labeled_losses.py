"""Losses of labelled pixels beside cross-entropy: class weights, focal loss, Dice, OHEM.

Losses that are a mean of pixels return `(sum, count)`, as in `pixel_losses`; all sums are
over the global batch.

Sources: focal loss, Lin et al., ICCV 2017; Dice loss, Milletari et al., 3DV 2016; online hard
example mining (OHEM), Shrivastava et al., CVPR 2016, as the published code of UniMatch has it
(`util/ohem.py`).
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from semiseg_jax.losses import pixel_losses
from semiseg_jax.losses.pixel_losses import IGNORE
from semiseg_jax.runtime.errors import UserError


def balanced_class_weights(
    pixels: Integer[np.ndarray, " classes"],
    class_names: Sequence[str] | None = None,
    absent: Literal["refuse", "zero"] = "refuse",
) -> Float[np.ndarray, " classes"]:
    """Weights sqrt(median of n / n_c) from the labelled pixels n_c of each class; on the host.

    The median is over the classes that have labelled pixels.

    Args:
        pixels: n_c, the valid labelled pixels of each class in the whole labelled set.
        class_names: for the error; class ids otherwise.
        absent: whether a class without labelled pixels is an error or has weight 0.

    Returns:
        float64 [classes].

    Raises:
        UserError: a class has no labelled pixels, and `absent` is "refuse"; or no class has any.
    """
    pixels = np.asarray(pixels, np.float64)
    missing = np.flatnonzero(pixels == 0).tolist()
    if len(missing) == len(pixels) or (absent == "refuse" and len(missing)):
        names = ", ".join(class_names[c] if class_names else str(c) for c in missing)
        raise UserError(
            f"Balanced class weights need labelled pixels of each class, and these classes have "
            f"none: {names}. Label an image that shows them, or set loss.absent_classes=zero.",
            code="class-without-labeled-pixels",
        )
    median = np.median(pixels[pixels > 0])
    return np.sqrt(np.divide(median, pixels, out=np.zeros_like(pixels), where=pixels > 0))


def weighted_cross_entropy(
    logits: Float[ArrayLike, "*pixels classes"],
    labels: Integer[ArrayLike, "*pixels"],
    class_weights: Float[ArrayLike, " classes"],
    ignore: int = IGNORE,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy with class weights over the valid pixels, as (sum of w_y CE, sum of w_y).

    Their ratio is the weighted mean of `torch.nn.CrossEntropyLoss(weight)`.

    Args:
        logits: class scores of any float dtype.
        labels: class ids, or `ignore`.
        class_weights: at least 0.
        ignore: label of the pixels that are not valid.
    """
    terms = pixel_losses.pixel_terms(logits, labels, ignore)
    weight = pixel_weights(labels, class_weights, terms.cross_entropy.dtype)
    total, _ = pixel_losses.masked_sum(weight * terms.cross_entropy, terms.valid)
    return total, pixel_losses.masked_sum(weight, terms.valid)[0]


def pixel_weights(
    labels: Integer[ArrayLike, "*pixels"], class_weights: Float[ArrayLike, " classes"], dtype: Any
) -> Float[Array, "*pixels"]:
    """The weight of the class of each pixel; 0 where the label is no class.

    Args:
        labels: class ids, or an ignored id outside of them.
        class_weights: at least 0.
        dtype: of the result.
    """
    weights = jnp.asarray(class_weights, dtype)
    # A sum over classes rather than an index, which would gather from the weights.
    is_label = jnp.asarray(labels, jnp.int32)[..., None] == jnp.arange(len(weights))
    return jnp.sum(jnp.where(is_label, weights, 0), axis=-1)


def focal_loss(
    logits: Float[ArrayLike, "*pixels classes"],
    labels: Integer[ArrayLike, "*pixels"],
    gamma: float = 2.0,
    ignore: int = IGNORE,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Focal loss (1 - p_y)^gamma CE over the valid pixels, as (sum, count).

    Args:
        logits: class scores of any float dtype.
        labels: class ids, or `ignore`.
        gamma: at least 0; 0 is cross-entropy.
        ignore: label of the pixels that are not valid.
    """
    terms = pixel_losses.pixel_terms(logits, labels, ignore)
    return pixel_losses.masked_sum(focal_map(terms, gamma), terms.valid)


def focal_map(terms: pixel_losses.PixelTerms, gamma: float = 2.0) -> Float[Array, "*pixels"]:
    """Focal loss of each pixel (Lin et al., ICCV 2017, equation 4)."""
    # The gradient of miss^gamma with gamma below 1 is infinite at 0, where the loss is 0.
    misses = terms.miss > 0
    factor = jnp.where(misses, terms.miss, 1) ** gamma
    return jnp.where(misses, factor * terms.cross_entropy, 0)


def ce_dice_loss(
    logits: Float[ArrayLike, "*pixels classes"],
    labels: Integer[ArrayLike, "*pixels"],
    ignore: int = IGNORE,
) -> Float[Array, ""]:
    """Mean cross-entropy plus `dice_loss`; 0 for a batch without valid pixels.

    Args:
        logits: class scores of any float dtype; the softmax is float32.
        labels: class ids, or `ignore`.
        ignore: label of the pixels that are not valid.
    """
    total, count = pixel_losses.cross_entropy(logits, labels, ignore)
    return total / jnp.maximum(count, 1) + dice_loss(logits, labels, ignore)


def dice_loss(
    logits: Float[ArrayLike, "*pixels classes"],
    labels: Integer[ArrayLike, "*pixels"],
    ignore: int = IGNORE,
) -> Float[Array, ""]:
    """Dice loss of the batch, in 0..1; 0 for a batch without valid pixels.

    It is 1 - the mean over the classes that the labels of the batch show of
    (2 sum p_c t_c + 1) / (sum p_c + sum t_c + 1), with sums over the valid pixels of the whole
    batch: the losses of micro-batches do not add up to it.

    Args:
        logits: class scores of any float dtype; the softmax is float32 (float64 for float64).
        labels: class ids, or `ignore`.
        ignore: label of the pixels that are not valid.
    """
    logits = jnp.asarray(logits)
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    labels = jnp.asarray(labels, jnp.int32)
    valid = (labels != ignore)[..., None]
    softmax = jax.nn.softmax(logits.astype(dtype), axis=-1)
    target = (labels[..., None] == jnp.arange(logits.shape[-1])) & valid
    pixels = tuple(range(labels.ndim))
    predicted = jnp.sum(jnp.where(valid, softmax, 0), axis=pixels)
    labeled = jnp.sum(target, axis=pixels, dtype=dtype)
    correct = jnp.sum(jnp.where(target, softmax, 0), axis=pixels)
    dice = (2 * correct + 1) / (predicted + labeled + 1)
    shown = labeled > 0
    return jnp.sum(jnp.where(shown, 1 - dice, 0)) / jnp.maximum(jnp.sum(shown), 1)


def ohem_cross_entropy(
    logits: Float[ArrayLike, "*pixels classes"],
    labels: Integer[ArrayLike, "*pixels"],
    probability: float = 0.7,
    share: float = 1 / 6,
    ignore: int = IGNORE,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the hard pixels of the global batch, as (sum in nats, count).

    A pixel is hard if p_y, the probability of its label, is at most the larger of `probability` and
    the k-th smallest p_y, where k is `share` of the valid pixels: at least a share of the pixels
    has a loss, and every pixel of a low probability has one. The published code gives k as a number
    of pixels (`min_kept`), whose meaning changes with crop and batch.

    Args:
        logits: class scores of any float dtype.
        labels: class ids, or `ignore`.
        probability: in 0..1.
        share: in 0..1, rounded to whole pixels; at least one pixel unless it is 0.
        ignore: label of the pixels that are not valid.
    """
    terms = pixel_losses.pixel_terms(logits, labels, ignore)
    return pixel_losses.masked_sum(terms.cross_entropy, hard_pixels(terms, probability, share))


def hard_pixels(
    terms: pixel_losses.PixelTerms, probability: float = 0.7, share: float = 1 / 6
) -> Bool[Array, "*pixels"]:
    """The pixels of `ohem_cross_entropy`.

    Args:
        terms: from `pixel_losses.pixel_terms`, of the global batch.
        probability, share: see `ohem_cross_entropy`.
    """
    p = jnp.exp(-jax.lax.stop_gradient(terms.cross_entropy)).astype(jnp.float32)
    valid = jnp.sum(terms.valid, dtype=jnp.int32)
    rank = jnp.maximum(jnp.round(share * valid.astype(jnp.float32)).astype(jnp.int32), share > 0)
    smallest = kth_smallest_probability(p, terms.valid, rank)
    return terms.valid & (p <= jnp.maximum(jnp.float32(probability), smallest))


def kth_smallest_probability(
    p: Float[Array, "*pixels"], valid: Bool[Array, "*pixels"], rank: Integer[Array, ""]
) -> Float[Array, ""]:
    """The k-th smallest probability of the valid pixels, exactly; 0 for rank 0.

    Floats of at least 0 are ordered as their bits are as integers. So the value is found bit by
    bit, from the highest: a bit is set if fewer than k pixels lie below the value with that bit.
    Each step counts pixels, and on several devices adds one integer of each. Sorting would bring
    the pixels of all devices together, and float sums would depend on the number of devices.

    Args:
        p: float32 in 0..1.
        valid: the pixels to look at, fewer than 2^31.
        rank: k, from 1 to the number of valid pixels; or 0.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)

    def add_bit(i: Integer[Array, ""], found: Integer[Array, ""]) -> Integer[Array, ""]:
        candidate = found | (jnp.int32(1) << (_HIGHEST_BIT - i).astype(jnp.int32))
        below = jnp.sum(valid & (bits < candidate), dtype=jnp.int32)
        return jnp.where(below < rank, candidate, found)

    found = jax.lax.fori_loop(0, _HIGHEST_BIT + 1, add_bit, jnp.int32(0))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


# Of the 32 bits of a float32 in 0..1, the sign and the highest bit of the exponent are 0.
_HIGHEST_BIT = 29
