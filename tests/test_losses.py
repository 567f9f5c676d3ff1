import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax import losses
from semiseg_jax.losses import IGNORE


def by_hand(logits, labels):
    """Returns (CE, 1 - p_y, max p) of the valid pixels, by definition, in float64."""
    logits = np.asarray(logits, np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    p = exp / exp.sum(-1, keepdims=True)
    valid = labels != IGNORE
    at_label = np.take_along_axis(p, np.where(valid, labels, 0)[..., None], -1)[..., 0]
    return (-np.log(at_label))[valid], (1 - at_label)[valid], p.max(-1)[valid]


@pytest.fixture(params=[1.0, 4.0, 12.0], ids=lambda s: f"logits*{s:g}")
def pixels(request):
    rng = np.random.default_rng(1)
    logits = (request.param * rng.normal(size=(2, 5, 7, 6))).astype(np.float32)
    labels = rng.integers(0, 6, (2, 5, 7)).astype(np.uint8)
    labels[0, :2] = IGNORE
    # Certain and correct: a small 1 - p_y loses its digits first.
    labels[1] = logits[1].argmax(-1)
    return logits, labels


def test_cross_entropy_equals_the_definition(pixels):
    ce, _, _ = by_hand(*pixels)
    total, count = losses.cross_entropy(*pixels)
    np.testing.assert_allclose(total, ce.sum(), rtol=1e-6)
    assert count == ce.size == 56


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, lambda ce, miss, w: w * ce + (1 - w) * 9.210340371976182 * miss),
        (
            {"direction": "official", "saturate": False},
            lambda ce, miss, w: (1 - w) * ce + w * 9.210340371976182 * miss,
        ),
        (
            {"direction": "official"},
            lambda ce, miss, w: np.where(
                w > 0.8, 9.210340371976182 * miss, (1 - w) * ce + w * 9.210340371976182 * miss
            ),
        ),
        (
            {"saturate": True, "label_floor": 1e-2, "alpha": 2.0, "beta": 0.5},
            lambda ce, miss, w: np.where(
                w > 0.8, 2 * ce, 2 * w * ce + 0.5 * (1 - w) * 4.605170185988092 * miss
            ),
        ),
    ],
    ids=["paper", "official unsaturated", "official", "kwargs"],
)
def test_self_correction_equals_the_definition(pixels, kwargs, expected):
    total, count = losses.self_correction(*pixels, **kwargs)
    terms = by_hand(*pixels)
    np.testing.assert_allclose(total, expected(*terms).sum(), rtol=1e-6)
    assert count == terms[0].size


def test_symmetric_cross_entropy_equals_the_definition(pixels):
    ce, miss, _ = by_hand(*pixels)
    total, _ = losses.symmetric_cross_entropy(*pixels, alpha=0.3, beta=2.0, label_floor=1e-4)
    np.testing.assert_allclose(total, (0.3 * ce + 2 * 9.210340371976182 * miss).sum(), rtol=1e-6)


ALL = [losses.cross_entropy, losses.self_correction, losses.symmetric_cross_entropy]


@pytest.mark.parametrize("loss", ALL)
def test_ignored_pixels_alone_give_zero_sum_count_and_gradient(loss):
    logits = jnp.ones((1, 2, 3, 4))
    labels = jnp.full((1, 2, 3), IGNORE, jnp.uint8)
    assert [float(v) for v in loss(logits, labels)] == [0.0, 0.0]
    gradient = jax.grad(lambda x: loss(x, labels)[0])(logits)
    assert not np.any(gradient)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("label", [0, 1])
def test_huge_logits_give_finite_losses_and_gradients(loss, label):
    logits = jnp.array([[1e4, -1e4, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: loss(x, jnp.array([label]))[0])(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (value == 0) == (label == 0)


def test_gradient_of_cross_entropy_is_softmax_minus_one_hot_even_at_a_tie():
    logits = jnp.array([[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    gradient = jax.grad(lambda x: losses.cross_entropy(x, jnp.array([1, 2]))[0])(logits)
    expected = jax.nn.softmax(logits) - jnp.array([[0, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_w_is_a_constant_by_default():
    logits, labels = jnp.array([[1.0, 0.2, -0.5]]), jnp.array([1])
    p = np.asarray(jax.nn.softmax(logits)[0], np.float64)
    # d/dl of w * CE + (1 - w) * R * (1 - p_y) with w constant, R = -log(1e-4)
    one_hot = np.array([0, 1, 0])
    reverse = -np.log(1e-4) * -p[1] * (one_hot - p)
    expected = p[0] * (p - one_hot) + (1 - p[0]) * reverse
    gradient = jax.grad(lambda x: losses.self_correction(x, labels)[0])(logits)[0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    moving = jax.grad(lambda x: losses.self_correction(x, labels, stop_gradient=False)[0])(logits)
    dw = p[0] * (np.array([1, 0, 0]) - p)
    extra = dw * (-np.log(p[1]) + np.log(1e-4) * (1 - p[1]))
    np.testing.assert_allclose(moving[0], expected + extra, rtol=1e-5)


def test_bfloat16_logits_are_reduced_in_float32():
    logits = jnp.zeros((1, 100, 100, 4), jnp.bfloat16)
    total, count = losses.cross_entropy(logits, jnp.zeros((1, 100, 100), jnp.int32))
    assert total.dtype == jnp.float32
    # In bfloat16 the sum would stop growing at 256.
    np.testing.assert_allclose(total, 10_000 * np.log(4), rtol=1e-6)
    assert count == 10_000


def test_a_negative_ignore_label():
    labels = np.array([[0, -1]])
    _, count = losses.cross_entropy(jnp.zeros((1, 2, 3)), labels, ignore=-1)
    assert count == 1
