"""How different images are from each other, by the pooled features of the backbone.

Source: k-centre greedy, Sener and Savarese, "Active Learning for Convolutional Neural Networks: A
Core-Set Approach" (ICLR 2018), algorithm 1.
"""

import numpy as np
from jaxtyping import Float, Int


def standardize(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Returns features whose squared distances have the mean 2 over pairs of images.

    Each feature has the mean 0 and the standard deviation 1/sqrt(d). Features that are equal in
    all images are 0.
    """
    deviation = features.std(axis=0)
    scale = np.where(deviation > 1e-6 * max(float(deviation.max()), 1e-30), deviation, np.inf)
    used = max(int(np.isfinite(scale).sum()), 1)
    return ((features - features.mean(axis=0)) / scale / np.sqrt(used)).astype(np.float64)


def nearest_distances(
    features: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "c d"]
) -> Float[np.ndarray, " n"]:
    """Returns the distance of each image to the nearest centre; infinite without centres."""
    nearest = np.full(len(features), np.inf)
    for centre in centres:
        nearest = np.minimum(nearest, np.linalg.norm(features - centre, axis=1))
    return nearest


def spread(
    features: Float[np.ndarray, "n d"],
    centres: Float[np.ndarray, "c d"],
    importance: Float[np.ndarray, " n"],
    count: int,
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Picks images one after the other: the largest product of importance and distance comes next.

    The distance is that to the nearest labelled or picked image. With equal importance this is
    k-centre greedy. Of equal products, as with copies of an image, the more important one comes
    first.

    Args:
        features: of the images to pick from, see `standardize`.
        centres: features of the labelled images.
        importance: of each image, at least 0.
        count: of images to pick; at most n are.

    Returns:
        The indices in the order of picking, and the distance of each when it was picked.
    """
    nearest = nearest_distances(features, centres)
    if not len(centres):
        # Any image is as far as any other from nothing.
        nearest[:] = 1.0
    is_left = np.ones(len(features), bool)
    picked: list[int] = []
    distances: list[float] = []
    for _ in range(min(count, len(features))):
        left = np.flatnonzero(is_left)
        order = np.lexsort((-importance[left], -importance[left] * nearest[left]))
        best = int(left[order[0]])
        picked.append(best)
        distances.append(float(nearest[best]))
        is_left[best] = False
        nearest = np.minimum(nearest, np.linalg.norm(features - features[best], axis=1))
    return np.array(picked, np.int64), np.array(distances)
