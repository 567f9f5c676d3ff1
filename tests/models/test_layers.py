import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from semiseg_jax.models import layers


@pytest.mark.parametrize("size", [(9, 14), (4, 3), (5, 7), (1, 1), (20, 2)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_resize_is_tensorflows(size, align_corners):
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    theirs = tf.raw_ops.ResizeBilinear(
        images=x, size=size, align_corners=align_corners, half_pixel_centers=not align_corners
    )
    np.testing.assert_allclose(
        layers.resize(jnp.asarray(x), size, align_corners), theirs, atol=2e-6
    )


def test_resize_from_one_pixel_is_constant():
    x = jnp.array([[[[3.0, -1.0]]]])
    np.testing.assert_array_equal(layers.resize(x, (4, 5)), np.broadcast_to(x, (1, 4, 5, 2)))


def test_resize_to_the_same_size_is_the_identity():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4, 2)))
    assert layers.resize(x, (3, 4)) is x


@pytest.mark.parametrize(("depthwise", "fan"), [(False, 3 * 3 * 64), (True, 3 * 3)])
def test_kernels_start_with_the_variance_that_keeps_activations(depthwise, fan):
    conv = layers.Conv(64, kernel_size=3, depthwise=depthwise)
    kernels = [
        conv.init(jax.random.key(seed), jnp.zeros((1, 3, 3, 64)))["params"]["kernel"]
        for seed in range(8)
    ]
    assert np.var(kernels) == pytest.approx(2 / fan, rel=0.1)
