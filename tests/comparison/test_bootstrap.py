"""The interval of a difference in mIoU, compared with a slow loop and in known cases."""

import numpy as np
import pytest

from semiseg_jax import metrics
from semiseg_jax.comparison import bootstrap


def confusions(seed, images, classes=3, right=0.7):
    """Confusion matrices of images with some of the classes, and labels of `seed` alone."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 40, (images, classes)) * (rng.random((images, classes)) < 0.7)
    labels[:, 0] += 1
    shares = np.full((classes, classes), (1 - right) / (classes - 1))
    np.fill_diagonal(shares, right)
    draw = np.random.default_rng(round(1000 * right))
    return np.array(
        [[draw.multinomial(n, p) for n, p in zip(row, shares, strict=True)] for row in labels]
    )


def counts(matrices):
    diagonal = np.diagonal(matrices, axis1=1, axis2=2)
    return np.stack([diagonal, matrices.sum(axis=2), matrices.sum(axis=1)], axis=1)


@pytest.mark.parametrize("images, classes", [(2, 2), (5, 3), (30, 19)])
def test_the_interval_equals_that_of_a_loop_over_resampled_confusion_matrices(images, classes):
    first, second = (confusions(images, images, classes, right) for right in (0.8, 0.6))
    differences = []
    # The draws of the first chunk; the function under test draws in chunks of 100.
    for drawn in np.random.default_rng(0).integers(0, images, (100, images)):
        sums = [sum(matrices[image] for image in drawn) for matrices in (first, second)]
        differences.append(metrics.mean_iou(sums[0]) - metrics.mean_iou(sums[1]))
    found = bootstrap.difference_interval(counts(first), counts(second), resamples=100)
    np.testing.assert_allclose(found, np.percentile(differences, [2.5, 97.5]), rtol=1e-12)


def test_the_interval_is_near_that_of_independent_draws():
    """Of many images the interval is that of the normal distribution; the draws are paired."""
    first, second = confusions(0, 400, right=0.8), confusions(0, 400, right=0.75)
    low, high = bootstrap.difference_interval(counts(first), counts(second))
    difference = metrics.mean_iou(first.sum(axis=0)) - metrics.mean_iou(second.sum(axis=0))
    assert low < difference < high
    # The jackknife is another estimate of the standard error.
    without = [
        metrics.mean_iou(np.delete(first, i, 0).sum(axis=0))
        - metrics.mean_iou(np.delete(second, i, 0).sum(axis=0))
        for i in range(400)
    ]
    error = np.sqrt(399 * np.var(without))
    np.testing.assert_allclose(high - low, 2 * 1.96 * error, rtol=0.15)


def test_equal_networks_differ_by_nothing():
    same = counts(confusions(3, 7))
    assert bootstrap.difference_interval(same, same) == (0, 0)


def test_exchanged_networks_have_the_mirrored_interval():
    first, second = (counts(confusions(4, 9, right=right)) for right in (0.9, 0.5))
    low, high = bootstrap.difference_interval(first, second)
    np.testing.assert_allclose(bootstrap.difference_interval(second, first), (-high, -low))


def test_images_that_are_all_alike_leave_no_doubt():
    first, second = (np.repeat(counts(confusions(5, 1, right=r)), 6, axis=0) for r in (0.9, 0.5))
    low, high = bootstrap.difference_interval(first, second)
    np.testing.assert_allclose(low, high)


def test_one_image_and_images_without_labels_say_nothing_of_others():
    one = counts(confusions(6, 1))
    assert bootstrap.difference_interval(one, one) is None
    unlabeled = np.concatenate([one, np.zeros((4, 3, 3), int)])
    assert bootstrap.difference_interval(unlabeled, unlabeled) is None
    three = counts(confusions(6, 3)), counts(confusions(6, 3, right=0.2))
    padded = [np.concatenate([array, np.zeros((4, 3, 3), int)]) for array in three]
    assert bootstrap.difference_interval(*padded) == bootstrap.difference_interval(*three)
