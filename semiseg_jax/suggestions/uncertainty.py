"""How unsure a network is of an image, as means over its pixels.

All measures are in 0..1, and 0 where the network is sure. They are means, never sums: a sum would
put the largest images first.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from semiseg_jax.losses import IGNORE


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """The measures of one image.

    Attributes:
        entropy: mean entropy of the averaged prediction, divided by that of equal probabilities.
        margin: mean of 1 - (largest - second largest probability) of the averaged prediction.
        views: mean share of the views (scales and mirror images) whose class is not that of the
            averaged prediction; None for a single view.
        class_shares: share of the pixels of each predicted class.
    """

    entropy: float
    margin: float
    views: float | None
    class_shares: Float[np.ndarray, " classes"]


def measure(views: Sequence[Float[np.ndarray, "h w classes"]]) -> Uncertainty:
    """Measures the uncertainty of an image.

    Args:
        views: class probabilities of its pixels, of each scale and mirror image.
    """
    mean = average(views)
    classes = mean.argmax(axis=-1)
    differ = None
    if len(views) > 1:
        differ = float(np.mean([(view.argmax(axis=-1) != classes).mean() for view in views]))
    counts = np.bincount(classes.ravel(), minlength=mean.shape[-1])
    return Uncertainty(
        entropy=float(entropy_map(mean).mean()),
        margin=float(margin_map(mean).mean()),
        views=differ,
        class_shares=counts / classes.size,
    )


def average(
    views: Sequence[Float[np.ndarray, "h w classes"]],
) -> Float[np.ndarray, "h w classes"]:
    """Returns the mean probabilities of all views, float32."""
    total = np.zeros_like(views[0], np.float32)
    for view in views:
        total += view
    return total / len(views)


def entropy_map(probabilities: Float[np.ndarray, "h w classes"]) -> Float[np.ndarray, "h w"]:
    """Returns the entropy of each pixel, divided by the logarithm of the number of classes."""
    # The smallest float: 0 * log(0) counts as 0, its limit.
    logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return -(probabilities * logs).sum(axis=-1) / np.log(probabilities.shape[-1])


def margin_map(probabilities: Float[np.ndarray, "h w classes"]) -> Float[np.ndarray, "h w"]:
    """Returns 1 - (largest - second largest probability) of each pixel."""
    largest = np.partition(probabilities, -2, axis=-1)[..., -2:]
    return 1 - (largest[..., 1] - largest[..., 0])


def label_difference(one: UInt8[np.ndarray, "h w"], other: UInt8[np.ndarray, "h w"]) -> float:
    """Returns the share of pixels with different labels, among those that both label maps label.

    Args:
        one, other: class ids and IGNORE. The result is 0 if no pixel has a label in both.
    """
    known = (one != IGNORE) & (other != IGNORE)
    return float((one != other)[known].mean()) if known.any() else 0.0
