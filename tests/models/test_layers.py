import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from jax import export

from semiseg_jax.models import layers

# Symbolic shapes of an image, and of an array that has the wanted size.
SYMBOLIC = ("n, h, w, 1", "oh, ow")


def like(height, width):
    return np.zeros((height, width), np.uint8)


@pytest.mark.parametrize("size", [(9, 14), (4, 3), (5, 7), (1, 1), (20, 2)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_resize_agrees_with_tensorflow(size, align_corners):
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    expected = tf.raw_ops.ResizeBilinear(
        images=x, size=size, align_corners=align_corners, half_pixel_centers=not align_corners
    )
    np.testing.assert_allclose(
        layers.resize(jnp.asarray(x), size, align_corners), expected, atol=2e-6
    )


def test_resize_from_one_pixel_is_constant():
    x = jnp.array([[[[3.0, -1.0]]]])
    np.testing.assert_array_equal(layers.resize(x, (4, 5)), np.broadcast_to(x, (1, 4, 5, 2)))


def test_resize_to_the_same_size_is_the_identity():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4, 2)))
    assert layers.resize(x, (3, 4)) is x


@pytest.mark.parametrize("align_corners", [False, True])
def test_resize_of_symbolic_sizes_equals_resize_of_each_size(align_corners):
    exported = export.export(
        jax.jit(lambda x, like: layers.resize(x, like.shape, align_corners)), platforms=["cpu"]
    )(*export.symbolic_args_specs((np.ones((1, 1, 1, 1), np.float32), like(1, 1)), SYMBOLIC))
    # In float32, centres at 5,000 would be off by .0002 pixels.
    for size, wanted in (((5, 7), (9, 3)), ((1, 1300), (4, 5200)), ((1, 1), (1, 1))):
        x = np.random.default_rng(0).normal(size=(2, *size, 1)).astype(np.float32)
        np.testing.assert_allclose(
            exported.call(x, like(*wanted)),
            layers.resize(jnp.asarray(x), wanted, align_corners),
            atol=1e-6,
        )


@pytest.mark.parametrize(("depthwise", "fan"), [(False, 3 * 3 * 64), (True, 3 * 3)])
def test_initial_kernels_have_the_variance_of_he_et_al(depthwise, fan):
    conv = layers.Conv(64, kernel_size=3, depthwise=depthwise)
    kernels = [
        conv.init(jax.random.key(seed), jnp.zeros((1, 3, 3, 64)))["params"]["kernel"]
        for seed in range(8)
    ]
    assert np.var(kernels) == pytest.approx(2 / fan, rel=0.1)
