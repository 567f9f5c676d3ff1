"""Discriminators and adversarial losses, beside a forward pass in NumPy with float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax.losses import IGNORE
from semiseg_jax.methods import adversarial_losses, discriminator
from semiseg_jax.methods.image_keys import image_keys
from semiseg_jax.methods.method import mean
from tests.methods.toy_network import narrow_discriminators

CLASSES, SIZE = 3, (32, 64)


@pytest.fixture
def narrow():
    with narrow_discriminators():
        yield


def logits_of_maps(seed=0, images=2):
    return np.random.default_rng(seed).normal(size=(images, *SIZE, CLASSES))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def convolve(x, kernel, bias):
    """A 4x4 convolution with stride 2 of even sides, padded by one pixel on each side."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), axis=(1, 2))[:, ::2, ::2]
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias


def enlarge(x, size):
    """Bilinear, with aligned corners."""
    for axis, length in enumerate(size, start=1):
        at = np.linspace(0, x.shape[axis] - 1, length)
        low = np.minimum(at.astype(int), max(x.shape[axis] - 2, 0))
        high = np.minimum(low + 1, x.shape[axis] - 1)
        part = (at - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        x = x.take(low, axis) * (1 - part) + x.take(high, axis) * part
    return x


def reference_logits(params, maps):
    x = maps
    for number in range(1, 6):
        layer = params[f"conv{number}"]
        x = convolve(x, layer["kernel"], layer["bias"])
        if number < 5:
            x = np.where(x > 0, x, 0.2 * x)
    return enlarge(x, maps.shape[1:3])[..., 0]


def make_params():
    """Those of a pixel discriminator, with biases, as float64."""
    maps = jnp.zeros((1, *SIZE, CLASSES))
    params = discriminator.PixelDiscriminator().init(jax.random.key(0), maps)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.asarray(x, float) + 0.1 * rng.normal(size=x.shape), params)


def test_the_published_layers():
    init = discriminator.PixelDiscriminator().init
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 21)))["params"]
    shapes = [params[f"conv{i}"]["kernel"].shape for i in range(1, 6)]
    widths = (21, 64, 128, 256, 512, 1)
    assert shapes == [(4, 4, widths[i], widths[i + 1]) for i in range(5)]
    maps, keys = jnp.zeros((1, 32, 32, 24)), image_keys(jax.random.key(0), 1)
    init = discriminator.ImageDiscriminator().init
    params = jax.eval_shape(init, jax.random.key(0), maps, keys)["params"]
    assert params.keys() == {"conv1", "conv2", "conv3", "conv4", "score"}
    assert params["score"]["kernel"].shape == (512, 1)


@pytest.mark.usefixtures("narrow")
def test_the_adversarial_gradient_at_the_logits_is_that_of_finite_differences():
    """Beside float64 NumPy, which sees logits where ours would see probabilities by mistake."""
    params, given = make_params(), logits_of_maps()
    valid = np.ones((2, *SIZE), bool)
    valid[:, :, -7:] = False

    def reference(x):
        maps = np.where(valid[..., None], softmax(x), 0)
        terms = np.logaddexp(0, -reference_logits(params, maps))
        return terms[valid].mean()

    @jax.value_and_grad
    def ours(x):
        maps = discriminator.predicted_map(x, jnp.asarray(valid))
        network = discriminator.PixelDiscriminator()
        scores = network.apply({"params": params}, maps)
        return mean(adversarial_losses.real_cross_entropy(scores, jnp.asarray(valid)))

    with jax.enable_x64(True):
        value, gradient = jax.device_get(ours(jnp.asarray(given)))
    np.testing.assert_allclose(value, reference(given), rtol=1e-10)
    rng = np.random.default_rng(2)
    for _ in range(4):
        direction = rng.normal(size=given.shape)
        step = 1e-4 * direction
        slope = (reference(given + step) - reference(given - step)) / 2e-4
        assert abs(slope) > 1e-5
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4)
    assert np.all(np.any(gradient[valid], axis=-1))
    assert not np.any(gradient[~valid])


def test_losses_take_logits():
    """A probability of .9 in the place of a logit would have a loss of .34, not .105."""
    logit = jnp.log(jnp.array([9.0, 1 / 9]))
    valid = jnp.array([True, True])
    real, count = adversarial_losses.real_cross_entropy(logit, valid)
    fake, _ = adversarial_losses.fake_cross_entropy(logit, valid)
    expected = -np.log(0.9) - np.log(0.1)
    np.testing.assert_allclose((real, fake, count), (expected, expected, 2), rtol=1e-6)
    # Where a sigmoid is 0, the segmenter still has a gradient.
    slope = jax.grad(lambda x: adversarial_losses.real_cross_entropy(x, valid)[0])
    np.testing.assert_allclose(slope(jnp.array([-200.0, -200.0])), -1)


def test_halves_of_the_discriminator_are_halved_and_its_answers_counted():
    real, fakes = jnp.array([2.0, -1.0, 5.0]), (jnp.array([1.0]), jnp.array([-3.0, -2.0, -1.0]))
    real_valid = jnp.array([True, True, False])
    fake_valid = jnp.array([True]), jnp.array([True, True, False])
    loss, metrics = adversarial_losses.discriminator_loss(real, fakes, real_valid, fake_valid)
    on_real = np.mean(np.logaddexp(0, [-2.0, 1.0]))
    on_fakes = np.mean(np.logaddexp(0, [1.0, -3.0, -2.0]))
    np.testing.assert_allclose(loss, on_real / 2 + on_fakes / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy_real"], 1 / 2)
    np.testing.assert_allclose(metrics["accuracy_fake"], 2 / 3, rtol=1e-6)


def test_ignored_pixels_are_zeros_in_both_maps():
    labels = jnp.array([[[0, IGNORE, 2]]])
    predicted = discriminator.predicted_map(jnp.ones((1, 1, 3, CLASSES)), labels != IGNORE)
    true = discriminator.true_map(labels, predicted)
    np.testing.assert_allclose(true[0, 0], [[1, 0, 0], [0, 0, 0], [0, 0, 1]])
    assert not np.any(predicted[0, 0, 1]) and np.all(predicted[0, 0, 0] > 0.3)


def test_images_are_scaled_over_the_batch_and_a_constant_one_is_safe():
    images = np.array([50, 100, 150, 250], np.uint8).reshape(2, 2, 1, 1).repeat(3, axis=-1)
    scaled = discriminator.scale_images(jnp.asarray(images), jnp.float32)
    np.testing.assert_allclose(scaled[..., 0].ravel(), [0, 0.25, 0.5, 1])
    for level in (0, 7, 255):
        constant = jnp.full((2, 4, 4, 3), level, jnp.uint8)
        np.testing.assert_array_equal(discriminator.scale_images(constant, jnp.float32), 0)


@pytest.mark.usefixtures("narrow")
def test_an_image_is_scored_by_its_place_in_the_batch_and_not_by_the_others():
    """Its dropout is its own, and the mean over its own positions is matched."""
    maps = jnp.asarray(softmax(logits_of_maps(images=3)), jnp.float32)
    keys = image_keys(jax.random.key(3), 3)
    network = discriminator.ImageDiscriminator()
    variables = network.init(jax.random.key(0), maps, keys)
    apply = jax.jit(functools.partial(network.apply, variables))
    scores, features = apply(maps, keys)
    alone, of_alone = apply(maps[1:2], keys[1:2])
    np.testing.assert_allclose(scores[1:2], alone, rtol=1e-5)
    np.testing.assert_allclose(features[1:2], of_alone, rtol=1e-4, atol=1e-6)
    again, _ = apply(maps, image_keys(jax.random.key(4), 3))
    assert np.all(scores != again)


def test_feature_matching_is_between_batch_means_and_trains_the_predictions_alone():
    real, fake = np.array([[1.0, 2.0], [3.0, 6.0], [99.0, 99.0]]), np.array([[1.0, 9.0]])
    counts = jnp.array([True, True, False]), jnp.array([True])
    loss, gradients = jax.value_and_grad(adversarial_losses.feature_matching, argnums=(0, 1))(
        jnp.asarray(real), jnp.asarray(fake), *counts
    )
    np.testing.assert_allclose(loss, (1 + 5) / 2)
    assert not np.any(gradients[0])
    np.testing.assert_allclose(gradients[1], [[-0.5, 0.5]])
    none = jnp.array([False])
    given = (jnp.asarray(real), jnp.asarray(fake), counts[0], none)
    assert adversarial_losses.feature_matching(*given) == 0
