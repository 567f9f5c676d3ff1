"""Segmentation metrics: the confusion matrix, and the scores computed from it."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer

from semiseg_jax.losses import IGNORE


def confusion_matrix(
    predictions: Integer[ArrayLike, "*pixels"],
    labels: Integer[ArrayLike, "*pixels"],
    num_classes: int,
    ignore: int = IGNORE,
) -> Integer[Array, "classes classes"]:
    """Counts pixels by label (row) and prediction (column).

    Pixels whose label is `ignore` are skipped, as are pixels whose label or prediction is not a
    class (a pseudo-label of low confidence is 255). Exact for up to 2^31 - 1 pixels per call; add
    the matrices of several calls in int64 on the host. Jittable; the batch may be sharded.

    Args:
        predictions: class ids, 0 to C - 1.
        labels: class ids, or `ignore`.
        num_classes: C.
        ignore: label of the pixels to skip.
    """
    labels = jnp.asarray(labels).astype(jnp.int32).ravel()
    predictions = jnp.asarray(predictions).astype(jnp.int32).ravel()
    counted = (labels != ignore) & _is_class(labels, num_classes)
    counted &= _is_class(predictions, num_classes)
    # Skipped pixels go to one extra bin beyond the matrix.
    cells = num_classes * num_classes
    index = jnp.where(counted, labels * num_classes + predictions, cells)
    return jnp.bincount(index, length=cells + 1)[:cells].reshape(num_classes, num_classes)


def _is_class(ids: Integer[Array, " pixels"], num_classes: int) -> Bool[Array, " pixels"]:
    return (ids >= 0) & (ids < num_classes)


def iou(confusion: Integer[ArrayLike, "classes classes"]) -> Float[np.ndarray, " classes"]:
    """Intersection over union of each class, in 0..1, computed in float64 on the host.

    NaN for a class that occurs neither in the labels nor in the predictions.
    """
    matrix = np.asarray(confusion).astype(np.float64)
    return iou_of_counts(np.stack([np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)]))


def iou_of_counts(
    counts: Integer[np.ndarray, "*sums 3 classes"] | Float[np.ndarray, "*sums 3 classes"],
) -> Float[np.ndarray, "*sums classes"]:
    """IoU of each class from numbers of pixels, as `iou`.

    Args:
        counts: by class, the pixels in the intersection of labels and predictions, in the labels,
            and in the predictions.
    """
    intersection, labels, predictions = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    union = predictions + labels - intersection
    return np.divide(intersection, union, out=np.full_like(union, np.nan), where=union > 0)


def class_counts(confusion: Integer[ArrayLike, "classes classes"]) -> Int[np.ndarray, "_present 4"]:
    """The pixels from which the IoU of each class follows, int64.

    Returns:
        A line for each class that occurs in the labels or the predictions: the class, its pixels
        in the intersection of both, in the labels, and in the predictions.
    """
    matrix = np.asarray(confusion).astype(np.int64)
    lines = np.stack(
        [np.arange(len(matrix)), np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)], 1
    )
    return lines[lines[:, 2:].any(axis=1)]


def mean_iou(confusion: Integer[ArrayLike, "classes classes"]) -> float:
    """Mean IoU over the classes that occur in the labels or the predictions, in 0..1."""
    per_class = iou(confusion)
    if np.isnan(per_class).all():
        return float("nan")
    return float(np.nanmean(per_class))


def pixel_accuracy(confusion: Integer[ArrayLike, "classes classes"]) -> float:
    """Share of the labelled pixels that are predicted correctly, in 0..1; NaN if there are none."""
    matrix = np.asarray(confusion).astype(np.float64)
    total = matrix.sum()
    return float(np.trace(matrix) / total) if total else float("nan")


def mean_class_accuracy(confusion: Integer[ArrayLike, "classes classes"]) -> float:
    """Mean recall of the classes that occur in the labels, in 0..1; NaN if there are none."""
    matrix = np.asarray(confusion).astype(np.float64)
    totals = matrix.sum(axis=1)
    if not totals.any():
        return float("nan")
    present = totals > 0
    return float(np.mean(np.diagonal(matrix)[present] / totals[present]))
