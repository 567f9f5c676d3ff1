import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax import losses
from semiseg_jax.losses import IGNORE
from tests.errors import raises_code
from tests.methods import arrays
from tests.methods.published import fixture, sample

LABELS = arrays.labels(7)
LOGITS = arrays.logits(3)
VALID = LABELS != IGNORE
TARGET = np.where(VALID, LABELS, 0)


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


P = softmax(LOGITS)
P_LABEL = np.take_along_axis(P, TARGET[..., None], -1)[..., 0]
CE = -np.log(P_LABEL)


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


# ---- class weights


def test_balanced_weights_by_hand():
    weights = losses.balanced_class_weights(np.array([100, 400, 25, 100]))
    np.testing.assert_allclose(weights, [1, 0.5, 2, 1], rtol=1e-12)
    # The median is over the classes that have pixels: 100 and 400.
    weights = losses.balanced_class_weights(np.array([100, 0, 400]), absent="zero")
    np.testing.assert_allclose(weights, [np.sqrt(2.5), 0, np.sqrt(0.625)], rtol=1e-12)


def test_balanced_weights_of_a_class_without_pixels_are_refused():
    with raises_code("class-without-labeled-pixels", "none: bus."):
        losses.balanced_class_weights(np.array([4, 0]), ["road", "bus"])
    with raises_code("class-without-labeled-pixels", "none: 0, 1."):
        losses.balanced_class_weights(np.array([0, 0]), absent="zero")


def test_weighted_cross_entropy_by_hand(in_float64):
    weights = np.array([1.0, 0.5, 3.0, 0.0, 2.0])
    total, weight = losses.weighted_cross_entropy(LOGITS, LABELS, weights)
    w = weights[TARGET] * VALID
    np.testing.assert_allclose([total, weight], [np.sum(w * CE), np.sum(w)], rtol=1e-10)
    same = losses.weighted_cross_entropy(LOGITS, LABELS, np.ones(5))
    np.testing.assert_allclose(same, losses.cross_entropy(LOGITS, LABELS), rtol=1e-12)


# ---- focal loss


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_by_hand(in_float64, gamma):
    total, count = losses.focal_loss(LOGITS, LABELS, gamma)
    np.testing.assert_allclose(total, np.sum(((1 - P_LABEL) ** gamma * CE)[VALID]), rtol=1e-9)
    assert count == VALID.sum()


# ---- cross-entropy and Dice


def test_ce_dice_by_hand(in_float64):
    # Class 1 has no label in the batch, but predictions.
    labels = np.where(LABELS == 1, 2, LABELS)
    valid, target = labels != IGNORE, np.where(labels != IGNORE, labels, 0)
    ce = -np.log(np.take_along_axis(P, target[..., None], -1)[..., 0])[valid].mean()
    dice = []
    for c in (0, 2, 3, 4):
        p, t = P[valid][:, c], target[valid] == c
        dice.append((2 * np.sum(p * t) + 1) / (np.sum(p) + np.sum(t) + 1))
    loss = losses.ce_dice_loss(LOGITS, labels)
    np.testing.assert_allclose(loss, ce + 1 - np.mean(dice), rtol=1e-10)


# ---- OHEM


@pytest.mark.parametrize("case", fixture("unimatch")["ohem"], ids=lambda case: str(case["share"]))
def test_ohem_is_that_of_the_published_code(in_float64, case):
    share, pixels = case["share"], np.sort(P_LABEL[VALID])
    # One of the cases is decided by the probability, the other by the share.
    assert (pixels[round(share * len(pixels)) - 1] > 0.7) == (share == 0.9)

    def loss(logits):
        total, count = losses.ohem_cross_entropy(logits, LABELS, 0.7, share)
        return total / count

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(LOGITS))
    np.testing.assert_allclose(value, case["loss"], rtol=1e-10)
    np.testing.assert_allclose(sample(gradient), case["gradient"], rtol=1e-8, atol=1e-15)


find = jax.jit(losses.kth_smallest_probability)


def test_the_kth_smallest_probability_is_exact():
    rng = np.random.default_rng(0)
    p = (10.0 ** rng.uniform(-44, 0, 500)).astype(np.float32)  # with numbers below the normal ones
    p[:100] = rng.choice(p, 100)  # ties
    p[100:103] = 0, 1, 1
    valid = rng.random(500) < 0.8
    for rank in (1, 2, 17, valid.sum() // 6, valid.sum()):
        assert find(p, valid, jnp.int32(rank)) == np.sort(p[valid])[rank - 1], rank


@pytest.mark.parametrize(
    ("probability", "share", "kept"),
    [
        (0.0, 0.5, 5),
        (0.0, 1.0, 10),
        (0.0, 0.0, 0),
        (0.35, 0.0, 3),
        (0.35, 0.2, 3),
        (0.35, 0.8, 8),
        (0.0, 0.01, 1),
    ],
)
def test_hard_pixels_by_hand(probability, share, kept):
    """Ten valid pixels of probabilities .1 to 1 (the last by its margin), and padding at .05."""
    p = np.append(np.arange(1, 11) / 10 - 1e-4, 0.05)
    logits = np.stack([np.log(p), np.log1p(-p)], -1).astype(np.float32)
    labels = np.array([0] * 10 + [IGNORE])
    hard = losses.hard_pixels(losses.pixel_terms(logits, labels), probability, share)
    np.testing.assert_array_equal(hard, np.arange(11) < kept)
    total, count = losses.ohem_cross_entropy(logits, labels, probability, share)
    assert count == kept
    np.testing.assert_allclose(total, -np.log(p[:kept]).sum(), rtol=1e-5)


def test_pixels_that_tie_with_the_kth_are_hard_too():
    _, count = losses.ohem_cross_entropy(np.zeros((6, 1)), np.zeros(6, int), 0.7, 0.5)
    assert count == 6


# ---- all of them


ALL = {
    "weighted": lambda *a: losses.weighted_cross_entropy(*a, np.array([1.0, 2.0, 0.5])),
    "focal": losses.focal_loss,
    "focal, small gamma": lambda *a: losses.focal_loss(*a, gamma=0.5),
    "ce_dice": lambda *a: (losses.ce_dice_loss(*a), 1.0),
    "ohem": losses.ohem_cross_entropy,
}


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_no_nan_without_valid_pixels_or_with_huge_logits(loss):
    def mean(logits, labels):
        total, count = loss(logits, labels)
        return total / jnp.maximum(count, 1)

    evaluate = jax.jit(jax.value_and_grad(mean))
    logits = jnp.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 1e4]])
    value, gradient = evaluate(logits, jnp.full(3, IGNORE, jnp.uint8))
    assert value == 0 and not np.any(gradient)
    value, gradient = evaluate(logits, jnp.array([0, 1, 0], jnp.uint8))
    assert np.isfinite(value) and np.isfinite(gradient).all() and value > 0


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_losses_of_bfloat16_logits_are_float32(loss):
    logits = jax.ShapeDtypeStruct((100, 100, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((100, 100), jnp.int32)
    assert jax.eval_shape(loss, logits, labels)[0].dtype == jnp.float32
