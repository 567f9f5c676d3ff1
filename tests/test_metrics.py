import jax
import numpy as np
import pytest
import sklearn.metrics

from semiseg_jax import metrics


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (3, 17, 23)).astype(np.uint8)
    predictions = rng.integers(0, 5, (3, 17, 23)).astype(np.uint8)
    labels[labels == 3] = 255
    predictions[predictions == 3] = 1
    predictions[predictions == 4] = 0
    return predictions, labels


def test_confusion_matrix_agrees_with_scikit_learn(maps):
    predictions, labels = maps
    result = jax.jit(metrics.confusion_matrix, static_argnums=2)(predictions, labels, 5)
    valid = labels != 255
    expected = sklearn.metrics.confusion_matrix(
        labels[valid], predictions[valid], labels=np.arange(5)
    )
    np.testing.assert_array_equal(result, expected)
    assert np.issubdtype(result.dtype, np.integer)


def test_iou_agrees_with_scikit_learn_and_is_nan_for_an_absent_class(maps):
    predictions, labels = maps
    result = metrics.iou(metrics.confusion_matrix(predictions, labels, 5))
    valid = labels != 255
    present = [0, 1, 2, 4]
    expected = sklearn.metrics.jaccard_score(
        labels[valid], predictions[valid], labels=present, average=None, zero_division=0
    )
    np.testing.assert_allclose(result[present], expected, rtol=1e-12)
    assert np.isnan(result[3])
    np.testing.assert_allclose(
        metrics.mean_iou(metrics.confusion_matrix(predictions, labels, 5)), expected.mean()
    )


def test_values_that_are_no_class_are_skipped():
    labels = np.array([0, -1, 3, 254, 1, 1, 2])
    predictions = np.array([255, 0, 1, 1, -1, 3, 2])
    expected = np.zeros((3, 3))
    expected[2, 2] = 1
    np.testing.assert_array_equal(metrics.confusion_matrix(predictions, labels, 3), expected)


def test_scores_of_a_small_matrix_by_hand():
    matrix = np.array([[3, 1], [2, 4]])
    np.testing.assert_allclose(metrics.iou(matrix), [3 / 6, 4 / 7])
    assert metrics.pixel_accuracy(matrix) == 0.7
    np.testing.assert_allclose(metrics.mean_class_accuracy(matrix), (3 / 4 + 4 / 6) / 2)


def test_scores_are_nan_without_labelled_pixels():
    empty = metrics.confusion_matrix(np.zeros((2, 2), int), np.full((2, 2), 255), 3)
    assert not np.any(empty)
    assert np.isnan(metrics.iou(empty)).all()
    assert np.isnan(metrics.mean_iou(empty))
    assert np.isnan(metrics.pixel_accuracy(empty))
    assert np.isnan(metrics.mean_class_accuracy(empty))
