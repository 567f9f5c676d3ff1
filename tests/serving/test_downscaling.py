"""Downscaling in use: to the bit that of the training data, and reversible for label maps."""

import functools

import jax
import numpy as np
import pytest
from jax import export
from PIL import Image

from semiseg_jax.data.sources.downscale import shrink_image, shrunk
from semiseg_jax.serving import downscaling


@pytest.mark.parametrize("factor", [2, 3, 7, 64])
def test_a_program_shrinks_images_of_every_size_as_training_does(factor):
    """One program with symbolic sizes; sizes that divide, that do not, and below the factor."""
    images = jax.ShapeDtypeStruct(export.symbolic_shape("n, h, w, 3"), np.uint8)
    program = jax.jit(functools.partial(downscaling.traced_shrink, factor=factor))
    shrink = export.export(program)(images).call
    rng = np.random.default_rng(factor)
    sizes = [(1, 4 * factor), (2 * factor - 1, factor), (3 * factor + 1, 5 * factor - 1)]
    for height, width in sizes:
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        image[:, ::3] = 255 * (rng.random((height, -(-width // 3), 3)) > 0.5)  # extreme values
        expected = shrink_image(image, factor)
        assert expected.shape[:2] == shrunk((height, width), factor)
        np.testing.assert_array_equal(shrink(image[None])[0], expected, err_msg=(height, width))


def test_a_label_map_of_any_size_survives_being_enlarged():
    """Masks are downscaled by nearest neighbour: this gives back what the network predicted."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        factor = int(rng.integers(2, 9))
        size = tuple(int(n) for n in rng.integers(1, 60, 2))
        small = rng.integers(0, 256, shrunk(size, factor)).astype(np.uint8)
        large = downscaling.enlarge(small, size)
        assert large.shape == size
        again = Image.fromarray(large).resize(small.shape[::-1], Image.Resampling.NEAREST)
        np.testing.assert_array_equal(np.asarray(again), small)


def test_a_program_enlarges_as_the_host_does():
    small = np.random.default_rng(1).integers(0, 256, (1, 5, 3, 2)).astype(np.uint8)
    large = jax.jit(downscaling.traced_enlarge, static_argnums=1)(small, (17, 6))
    np.testing.assert_array_equal(large[0], downscaling.enlarge(small[0], (17, 6)))
