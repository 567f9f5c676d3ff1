"""How much a difference in mIoU depends on which images were evaluated: a bootstrap over images."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from semiseg_jax import metrics

# Resamples, and the shares of them below the two ends of the interval: a 95 % interval.
RESAMPLES = 2000
_ENDS = (0.025, 0.975)
# Resamples that are computed at a time, and with them the memory.
_CHUNK = 100


def difference_interval(
    first: Int[np.ndarray, "images 3 classes"],
    second: Int[np.ndarray, "images 3 classes"],
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """Returns a 95 % interval of the difference in mIoU of two networks on the same images.

    The percentile bootstrap, paired: images are drawn with replacement, as many as there are; the
    pixels of the drawn images are summed for each network, and the mIoU of each is computed from
    its sum, over the classes that occur in it. The interval is that of the differences. It says how
    much the difference would vary with other images of the same kind, not with other seeds of the
    training. Of a few images it is rough, and rather too short.

    The draws are the same at every call. Source: Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13.

    Args:
        first: by image and class, the pixels of a network in the intersection of label and
            prediction, in the labels, and in the predictions (`ImageCounts.to_array`).
        second: the same of the other network, images in the same order.
        resamples: how often images are drawn.

    Returns:
        Both ends of the interval of first minus second, in -1..1; None for fewer than two images
        with labelled pixels, which say nothing about others.
    """
    # Images without a labelled pixel change no mIoU.
    is_labeled = first[:, 1].any(axis=1) | second[:, 1].any(axis=1)
    count = int(is_labeled.sum())
    if count < 2:
        return None
    stages = [array[is_labeled].reshape(count, -1).astype(np.float64) for array in (first, second)]
    differences = []
    for drawn in _draws(count, resamples):
        sums = [(drawn @ stage).reshape(-1, *first.shape[1:]) for stage in stages]
        # A class that is in no drawn image has no IoU.
        mious = [np.nanmean(metrics.iou_of_counts(counts), axis=-1) for counts in sums]
        differences.append(mious[0] - mious[1])
    low, high = np.quantile(np.concatenate(differences), _ENDS)
    return float(low), float(high)


def _draws(images: int, resamples: int) -> Iterator[Float[np.ndarray, "chunk images"]]:
    """Yields how often each image is drawn, for all resamples in chunks."""
    rng = np.random.default_rng(0)
    for start in range(0, resamples, _CHUNK):
        drawn = rng.integers(0, images, (min(_CHUNK, resamples - start), images))
        yield np.stack([np.bincount(row, minlength=images) for row in drawn]).astype(np.float64)
