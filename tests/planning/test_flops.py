"""Counted operations against brute-force counts."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from semiseg_jax.models.convolutions import conv2d
from semiseg_jax.planning import flops


def counted(function, *arguments):
    return flops.count(jax.jit(function).trace(*arguments).jaxpr)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def count_pixel_taps(size, taps, outputs, stride, dilation, low):
    """Counts (output, tap) pairs that read a pixel, for one image and one channel."""
    return sum(
        all(
            0 <= o * stride + t * dilation - pad < n
            for o, t, pad, n in zip(out, tap, low, size, strict=True)
        )
        for out in itertools.product(*map(range, outputs))
        for tap in itertools.product(*map(range, taps))
    )


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["torch", "same", ((0, 0), (0, 0))])
def test_convolution_and_both_gradients_equal_the_brute_force_count(
    padding, stride, dilation, groups
):
    images, kernel = array(2, 11, 8, 6), array(3, 3, 6 // groups, 6)

    def convolve(x, k):
        return conv2d(x, k, stride=stride, dilation=dilation, padding=padding, groups=groups)

    shape = jax.eval_shape(convolve, images, kernel).shape
    low = {"torch": (dilation, dilation), "same": None}.get(padding, (0, 0))
    if low is None:  # TensorFlow's rule: the smaller half of the padding is before the image
        total = [
            (o - 1) * stride + 2 * dilation + 1 - n for o, n in ((shape[1], 11), (shape[2], 8))
        ]
        low = [max(t, 0) // 2 for t in total]
    products = count_pixel_taps((11, 8), (3, 3), shape[1:3], stride, dilation, low)
    expected = (
        2 * products * 2 * 6 * (6 // groups)
    )  # images, output channels, input channels per group
    assert counted(convolve, images, kernel) == expected

    both = jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2), argnums=(0, 1))
    assert counted(both, images, kernel) == 3 * expected


def test_unpadded_convolution_equals_the_usual_formula():
    operations = counted(
        lambda x, k: conv2d(x, k, padding=((0, 0),) * 2), array(2, 9, 9, 4), array(3, 3, 4, 5)
    )
    assert operations == 2 * 2 * 7 * 7 * 3 * 3 * 4 * 5


def test_the_compiler_counts_a_convolution_equally():
    def convolve(x, k):
        return lax.conv_general_dilated(
            x, k, (2, 2), ((2, 1), (0, 3)), rhs_dilation=(2, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    arguments = array(2, 9, 8, 4), array(3, 3, 4, 5)
    compiled = jax.jit(convolve).lower(*arguments).compile()
    assert counted(convolve, *arguments) == compiled.cost_analysis()["flops"]


def test_matrix_products_in_calls_and_loops():
    def product(a, b):
        return jnp.einsum("bij,bjk->bik", a, b)

    once = 2 * 3 * 4 * 5 * 6
    arguments = array(3, 4, 5), array(3, 5, 6)
    assert counted(product, *arguments) == once
    assert (
        counted(lambda a, b: jax.jit(product)(a, b) + jax.jit(product)(a, b), *arguments)
        == 2 * once
    )

    def loop(a, b):
        return lax.scan(
            lambda total, _: (total + product(a, b), None), jnp.zeros((3, 4, 6)), length=7
        )[0]

    assert counted(loop, *arguments) == 7 * once


def test_a_rematerialised_product_counts_as_often_as_it_is_computed():
    def loss(a, b):
        return jnp.sum(jnp.sin(a @ b))

    plain = counted(jax.grad(loss, argnums=(0, 1)), array(4, 5), array(5, 6))
    again = counted(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), array(4, 5), array(5, 6))
    assert (plain, again) == (3 * 2 * 4 * 5 * 6, 4 * 2 * 4 * 5 * 6)


def test_a_loop_of_unknown_length_raises():
    def loop(a):
        return lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ x, a)

    with pytest.raises(ValueError, match="no length"):
        counted(loop, array(3, 3))
