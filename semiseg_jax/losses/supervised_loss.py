"""The loss of labelled pixels that a config selects: `loss.labeled` and `loss.class_weights`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from semiseg_jax.losses import labeled_losses, pixel_losses
from semiseg_jax.losses.pixel_losses import IGNORE
from semiseg_jax.runtime.errors import UserError

KINDS = ("ce", "ohem", "focal", "ce_dice")
# Defined over all labelled pixels of a batch: the losses of micro-batches do not add up to them.
WHOLE_BATCH_KINDS = ("ohem", "ce_dice")


def check(config: Any) -> None:
    """Checks the keys of the supervised loss against each other and against `train.accumulate`.

    Raises:
        UserError: naming the keys that disagree.
    """
    loss, accumulate = config.loss, config.train.accumulate
    if loss.labeled in WHOLE_BATCH_KINDS and accumulate > 1:
        raise UserError(
            f"loss.labeled is {loss.labeled}, which is defined over all labelled images of a step, "
            f"and train.accumulate {accumulate}: set train.accumulate to 1, or loss.labeled to ce "
            "or focal.",
            code="loss-of-whole-batch-accumulated",
        )
    if loss.labeled == "ohem" and not loss.ohem.probability and not loss.ohem.share:
        raise UserError(
            "loss.ohem.probability and loss.ohem.share are both 0, so that no labelled pixel would "
            "have a loss: make one of them larger.",
            code="ohem-without-pixels",
        )


def resolve(config: Any, pixels: Integer[np.ndarray, " classes"], names: Sequence[str]) -> Any:
    """Returns the config with class weights as numbers, as the training step reads them.

    Args:
        config: the whole config.
        pixels: labelled pixels of each class in the whole labelled set.
        names: of the classes, for the error.

    Raises:
        UserError: a class has no labelled pixels, and `loss.absent_classes` refuses that; or the
            weights given are not one for each class, or leave no labelled pixel a loss.
    """
    given = config.loss.class_weights
    if not has_weights(config.loss):
        return config
    if given == "balanced":
        weights = labeled_losses.balanced_class_weights(pixels, names, config.loss.absent_classes)
    else:
        weights = np.asarray(given, np.float64)
        _check_given_weights(weights, pixels, names)
    resolved = config.copy_and_resolve_references()
    with resolved.ignore_type():
        resolved.loss.class_weights = tuple(weights.tolist())
    return resolved


def _check_given_weights(
    weights: Float[np.ndarray, " given"],
    pixels: Integer[np.ndarray, " classes"],
    names: Sequence[str],
) -> None:
    """Checks that there is a weight for each class, and one above 0 that acts.

    Raises:
        UserError: naming the classes.
    """
    if len(weights) != len(names):
        raise UserError(
            f"loss.class_weights has {len(weights)} numbers for {len(names)} classes: give one for "
            f"each of {', '.join(names)}.",
            code="class-weights-count",
        )
    if not np.any(weights[np.asarray(pixels) > 0]):
        raise UserError(
            "loss.class_weights is 0 for every class that has labelled pixels, so that nothing "
            "would be learnt from labels: make one of them larger.",
            code="class-weights-all-zero",
        )


def mean_loss(
    logits: Float[Array, "*pixels classes"], labels: Integer[Array, "*pixels"], loss_config: Any
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The supervised loss of a batch of labelled images alone; 0 without valid pixels.

    Where pseudo-labelled images are in the same batch, `train_step.LossSums` has the same loss.

    Args:
        logits: of the global batch.
        labels: class ids, or IGNORE.
        loss_config: `config.loss`, from `resolve`.

    Returns:
        The loss, and its metrics: with OHEM the share of the valid pixels that have a loss.
    """
    terms = pixel_losses.pixel_terms(logits, labels)
    of_pixels = supervised_pixels(terms, labels, terms.valid, loss_config)
    total, kept = pixel_losses.masked_sum(of_pixels.loss, of_pixels.kept)
    weight, _ = pixel_losses.masked_sum(of_pixels.weight, of_pixels.kept)
    loss = divided(total, weight) + dice_loss(logits, labels, terms.valid, loss_config)
    if loss_config.labeled != "ohem":
        return loss, {}
    valid = jnp.sum(terms.valid, dtype=kept.dtype)
    return loss, {"kept_labeled": kept / jnp.maximum(valid, 1)}


def divided(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    """A sum over pixels divided by their weight; 0 without pixels."""
    # Class weights may add up to less than 1.
    return total / jnp.where(weight > 0, weight, 1)


class SupervisedPixels(NamedTuple):
    """The supervised loss of each pixel; arrays of one shape.

    The loss of a batch is the sum of `loss` divided by the sum of `weight`, over the kept pixels.

    Attributes:
        loss: in nats, multiplied by `weight`.
        weight: of the class; 1 without class weights.
        kept: the pixels that have a loss: the labelled ones, or with OHEM the hard ones of them.
    """

    loss: Float[Array, "*pixels"]
    weight: Float[Array, "*pixels"]
    kept: Bool[Array, "*pixels"]


def supervised_pixels(
    terms: pixel_losses.PixelTerms,
    labels: Integer[Array, "*pixels"],
    labeled: Bool[Array, "*pixels"],
    loss_config: Any,
) -> SupervisedPixels:
    """The supervised loss of each pixel; for "ce_dice" without the Dice loss, see `dice_loss`.

    Args:
        terms: of the pixels of a batch; for OHEM of the global batch.
        labels: class ids, or IGNORE.
        labeled: the valid pixels with true labels.
        loss_config: `config.loss`, from `resolve`.
    """
    loss, kept = terms.cross_entropy, labeled
    if loss_config.labeled == "focal":
        loss = labeled_losses.focal_map(terms, loss_config.focal_gamma)
    elif loss_config.labeled == "ohem":
        kept = labeled_losses.hard_pixels(
            dataclasses.replace(terms, valid=labeled),
            loss_config.ohem.probability,
            loss_config.ohem.share,
        )
    weight = pixel_weights(labels, loss_config, loss.dtype)
    return SupervisedPixels(loss * weight if has_weights(loss_config) else loss, weight, kept)


def is_plain_mean(loss_config: Any) -> bool:
    """Whether every labelled pixel has a loss, and all have the same weight."""
    return loss_config.labeled != "ohem" and not has_weights(loss_config)


def has_weights(loss_config: Any) -> bool:
    """Whether labelled pixels have weights by their class."""
    return len(loss_config.class_weights) > 0


def pixel_weights(
    labels: Integer[Array, "*pixels"], loss_config: Any, dtype: Any
) -> Float[Array, "*pixels"]:
    """The weight of the class of each pixel; 1 without class weights.

    Args:
        labels: class ids, or IGNORE.
        loss_config: `config.loss`, from `resolve`.
        dtype: of the result.

    Raises:
        ValueError: `loss_config` is not from `resolve`.
    """
    weights = loss_config.class_weights
    if not has_weights(loss_config):
        return jnp.ones(labels.shape, dtype)
    if isinstance(weights, str):
        raise ValueError(
            f"loss.class_weights is {weights!r}: call supervised_loss.resolve, which counts pixels."
        )
    return labeled_losses.pixel_weights(labels, np.asarray(weights), dtype)


def dice_loss(
    logits: Float[Array, "*pixels classes"],
    labels: Integer[Array, "*pixels"],
    labeled: Bool[Array, "*pixels"],
    loss_config: Any,
) -> Float[Array, ""]:
    """The Dice loss that "ce_dice" adds; 0 for the other kinds.

    Args:
        logits: of the global batch.
        labels: class ids, or IGNORE.
        labeled: the valid pixels with true labels.
        loss_config: `config.loss`.
    """
    if loss_config.labeled != "ce_dice":
        return jnp.zeros((), jnp.promote_types(logits.dtype, jnp.float32))
    return labeled_losses.dice_loss(logits, jnp.where(labeled, labels, IGNORE))
