"""Segmentation metrics as sufficient statistics: a confusion matrix, and what follows from it."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer


def confusion_matrix(
    predictions: Integer[ArrayLike, "*pixels"],
    labels: Integer[ArrayLike, "*pixels"],
    num_classes: int,
    ignore: int = 255,
) -> Integer[Array, "classes classes"]:
    """Pixel counts, rows the labels and columns the predictions.

    Pixels whose label is `ignore` count nowhere, nor do those whose label or prediction is no class
    (the 255 of a pseudo-label of little confidence). Exact for up to 2^31 - 1 pixels a call; add
    the matrices of several calls in int64 on the host. Jittable; the batch may be sharded.

    Args:
        predictions: class ids, 0 to C - 1.
        labels: class ids, or `ignore`.
        num_classes: C.
        ignore: the label to leave out.
    """
    labels = jnp.asarray(labels).astype(jnp.int32).ravel()
    predictions = jnp.asarray(predictions).astype(jnp.int32).ravel()
    counted = (labels != ignore) & _is_class(labels, num_classes)
    counted &= _is_class(predictions, num_classes)
    # One bin beyond the matrix takes the other pixels.
    cells = num_classes * num_classes
    index = jnp.where(counted, labels * num_classes + predictions, cells)
    return jnp.bincount(index, length=cells + 1)[:cells].reshape(num_classes, num_classes)


def _is_class(ids: Integer[Array, " pixels"], num_classes: int) -> Bool[Array, " pixels"]:
    return (ids >= 0) & (ids < num_classes)


def iou(confusion: Integer[ArrayLike, "classes classes"]) -> Float[np.ndarray, " classes"]:
    """Intersection over union of each class, in 0..1; NaN where a class occurs in neither.

    Computed in float64 on the host.
    """
    matrix = np.asarray(confusion).astype(np.float64)
    intersection = np.diagonal(matrix)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - intersection
    return np.divide(intersection, union, out=np.full_like(union, np.nan), where=union > 0)


def mean_iou(confusion: Integer[ArrayLike, "classes classes"]) -> float:
    """Mean IoU over the classes that occur in the labels or the predictions, in 0..1."""
    per_class = iou(confusion)
    if np.isnan(per_class).all():
        return float("nan")
    return float(np.nanmean(per_class))


def pixel_accuracy(
    confusion: Integer[ArrayLike, "classes classes"],
) -> float:
    """Share of the labelled pixels whose class is predicted, in 0..1; NaN without a pixel."""
    matrix = np.asarray(confusion).astype(np.float64)
    total = matrix.sum()
    return float(np.trace(matrix) / total) if total else float("nan")


def mean_class_accuracy(
    confusion: Integer[ArrayLike, "classes classes"],
) -> float:
    """Mean over the labelled classes of the share of their pixels found, in 0..1."""
    matrix = np.asarray(confusion).astype(np.float64)
    totals = matrix.sum(axis=1)
    if not totals.any():
        return float("nan")
    present = totals > 0
    return float(np.mean(np.diagonal(matrix)[present] / totals[present]))
