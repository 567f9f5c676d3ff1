"""`data.downscale` in use: images shrink as for training, and label maps get the images' size back.

A network that was trained and evaluated on downscaled images predicts downscaled images. Each
function has a form for one image on the host, by Pillow and NumPy, and a form for a batch inside a
program, whose sizes may be symbolic. Both forms give the same bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Int32, Shaped, UInt8
from PIL import Image

from semiseg_jax.models.convolutions import Dim
from semiseg_jax.shape_buckets import Size

# Fraction bits of Pillow's filter weights for channels of 8 bits.
_WEIGHT_BITS = 22


def enlarge(
    array: Shaped[np.ndarray, "sh sw *rest"], size: Size
) -> Shaped[np.ndarray, "h w *rest"]:
    """Enlarges class ids or probabilities to the size of the image before it was shrunk.

    Nearest neighbour, as masks are downscaled: a label map of the evaluation is what its enlarged
    copy becomes if it is downscaled like a mask.

    Args:
        array: with the size of the downscaled image.
        size: (height, width) in pixels.
    """
    for axis, length in enumerate(size):
        array = array.take(_nearest(array.shape[axis], np.arange(length), length), axis)
    return array


def enlarge_image(image: UInt8[np.ndarray, "sh sw 3"], size: Size) -> UInt8[np.ndarray, "h w 3"]:
    """Enlarges an image, for display; bilinear.

    Args:
        image: RGB.
        size: (height, width) in pixels.
    """
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def traced_enlarge(
    array: Shaped[Array, "n sh sw *rest"], size: tuple[Dim, Dim]
) -> Shaped[Array, "n h w *rest"]:
    """Computes `enlarge` for a batch inside a program."""
    for axis, length in enumerate(size, 1):
        index = _nearest(array.shape[axis], jnp.arange(length), length)
        array = jnp.take(array, index, axis, mode="clip")
    return array


def _nearest(small: Dim, positions, length: Dim):
    """Returns the pixel of the small axis whose square contains the centre of each position."""
    return (2 * positions + 1) * small // (2 * length)


def traced_shrink(images: UInt8[Array, "n h w 3"], factor: int) -> UInt8[Array, "n sh sw 3"]:
    """Computes `data.sources.downscale.shrink_image` for a batch inside a program."""
    for axis in (2, 1):  # Pillow resizes the rows first, and rounds before it resizes the columns.
        images = _shrink_axis(images, axis, factor)
    return images


def _shrink_axis(
    images: UInt8[Array, "n h w 3"], axis: int, factor: int
) -> UInt8[Array, "n oh ow 3"]:
    size = images.shape[axis]
    small = core.max_dim(size // factor, 1)
    # A pixel of the result is the mean of at most this many pixels: the filter is two pixels of
    # the result wide, and size / small is below 2 * factor for one pixel, else at most
    # factor + (factor - 1) / 2.
    taps = 3 * factor
    first, weights = _triangle_filter(size, small, taps)
    shape = [1] * 4
    shape[axis] = -1

    def add_tap(tap: Array, total: Int32[Array, "n oh ow 3"]) -> Int32[Array, "n oh ow 3"]:
        pixels = jnp.take(images, first + tap, axis, mode="clip").astype(jnp.int32)
        return total + pixels * weights[:, tap].reshape(shape)

    result_shape = (*images.shape[:axis], small, *images.shape[axis + 1 :])
    half = jnp.full(result_shape, 1 << (_WEIGHT_BITS - 1), jnp.int32)
    total = jax.lax.fori_loop(0, taps, add_tap, half)
    return (total >> _WEIGHT_BITS).astype(jnp.uint8)


def _triangle_filter(
    size: Dim, small: Dim, taps: int
) -> tuple[Int32[Array, " small"], Int32[Array, "small taps"]]:
    """Returns Pillow's antialiased bilinear filter from `size` to `small` pixels.

    Weights are rounded to _WEIGHT_BITS fraction bits, as Pillow does. They are computed in integers
    throughout, because float32 would round some of them otherwise. int32 suffices for sizes whose
    product is at most 2^29.

    Returns:
        The first pixel that each pixel of the result reads, which may be negative, and the weights
        of that pixel and of those after it; 0 outside of the image.
    """
    centres = (2 * jnp.arange(small) + 1) * size  # in units of 1 / (2 * small) pixels
    first = (centres - 2 * size - small) // (2 * small) + 1
    pixels = first[:, None] + jnp.arange(taps)
    heights = 2 * size - jnp.abs((2 * pixels + 1) * small - centres[:, None])
    heights = jnp.where((pixels >= 0) & (pixels < size), jnp.maximum(heights, 0), 0)
    total = jnp.sum(heights, axis=1, keepdims=True)
    # heights / total by long division; the fixed-point product would exceed int32.
    weights, rest = heights // total, heights % total
    for _ in range(_WEIGHT_BITS):
        rest = 2 * rest
        bit = (rest >= total).astype(rest.dtype)
        weights, rest = 2 * weights + bit, rest - bit * total
    return first, weights + (2 * rest >= total)
