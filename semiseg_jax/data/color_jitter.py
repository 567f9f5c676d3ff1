"""Colour augmentation of consistency methods: jitter, greyscale and blur, each with a probability.

The jitter follows torchvision's ColorJitter on PIL images, with which the methods were published:
brightness, contrast, saturation and hue in random order, each by a factor of its own. An operation
changes only the image, and every result is a pure function of image, seed and config. The image has
no padding, so that padding enters neither the mean of the contrast nor the blur.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from semiseg_jax.data import sda_ops
from semiseg_jax.runtime import python_calls
from semiseg_jax.runtime.quiet_tensorflow import tf


@dataclasses.dataclass(frozen=True)
class ColorDraw:
    """One draw of the colour augmentation.

    Attributes:
        order: the order of brightness (0), contrast (1), saturation (2) and hue (3), int32 [4].
        factors: the factors of brightness, contrast and saturation, 1 for no change, and the shift
            of hue as a share of the full circle, float32 [4].
        sigma: standard deviation of the blur in pixels, float32 [].
        is_jittered, is_grey, is_blurred: whether each step is applied, bool [].
    """

    order: tf.Tensor
    factors: tf.Tensor
    sigma: tf.Tensor
    is_jittered: tf.Tensor
    is_grey: tf.Tensor
    is_blurred: tf.Tensor


def draw(seed: tf.Tensor, views_config: Any) -> ColorDraw:
    """Draws order, factors, blur and the steps that are applied, all independently.

    Args:
        seed: int [2]; the result is a pure function of it and the config.
        views_config: `config.method.views`; all keys but `kind` and `per_batch` are read.
    """
    order_seed, value_seed = tf.unstack(
        tf.random.experimental.stateless_split(tf.cast(seed, tf.int64), 2, alg="philox")
    )
    order = tf.random.experimental.stateless_shuffle(tf.range(4), order_seed, alg="philox")
    uniform = tf.random.stateless_uniform([8], value_seed, alg="philox")
    *strengths, hue = views_config.jitter
    low = tf.constant([max(0.0, 1 - s) for s in strengths] + [-hue], tf.float32)
    high = tf.constant([1 + s for s in strengths] + [hue], tf.float32)
    low_sigma, high_sigma = views_config.blur_sigma
    return ColorDraw(
        order=order,
        factors=low + (high - low) * uniform[:4],
        sigma=low_sigma + (high_sigma - low_sigma) * uniform[4],
        is_jittered=uniform[5] < views_config.jitter_probability,
        is_grey=uniform[6] < views_config.grey_probability,
        is_blurred=uniform[7] < views_config.blur_probability,
    )


# The function has no Python control flow on tensors, which autograph would convert in vain.
@tf.autograph.experimental.do_not_convert
def color_augment(image: tf.Tensor, seed: tf.Tensor, views_config: Any) -> tf.Tensor:
    """Applies jitter, then greyscale, then blur, each if the draw says so.

    Args:
        image: uint8 [h, w, 3], RGB without padding.
        seed: int [2].
        views_config: `config.method.views`.

    Returns:
        uint8 [h, w, 3].
    """
    drawn = draw(seed, views_config)

    def jitter(image: tf.Tensor) -> tf.Tensor:
        return _jitter(image, drawn.order, drawn.factors, views_config.jitter)

    def blur(image: tf.Tensor) -> tf.Tensor:
        return python_calls.call(sda_ops.gaussian_blur, [image, drawn.sigma], tf.uint8, image.shape)

    for is_applied, probability, operation in (
        (drawn.is_jittered, views_config.jitter_probability, jitter),
        (drawn.is_grey, views_config.grey_probability, greyscale),
        (drawn.is_blurred, views_config.blur_probability, blur),
    ):
        if probability:  # An operation that never happens is not traced.
            image = _apply_if(is_applied, operation, image)
    return image


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """factor * x, rounded down and clipped, as PIL's ImageEnhance.Brightness; factor float []."""
    return _blend(tf.zeros([], tf.float32), image, factor)


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """m + factor * (x - m), as PIL's ImageEnhance.Contrast; m is the rounded mean of the greys."""
    mean = tf.floor(tf.reduce_mean(tf.cast(_grey_levels(image), tf.float64)) + 0.5)
    return _blend(tf.cast(mean, tf.float32), image, factor)


def saturation(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """g + factor * (x - g), as PIL's ImageEnhance.Color; g is the grey level of the pixel."""
    return _blend(tf.cast(_grey_levels(image)[..., None], tf.float32), image, factor)


def hue(image: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """Turns the hue of HSV by `shift`, float [], a share of the full circle.

    Computed in float, as torchvision does for tensors. For PIL images, torchvision rounds hue,
    saturation and value to 8 bits, which changes levels by a few.
    """
    # 255 is the full circle there.
    inputs = [image, 255 * shift, tf.zeros([], tf.float32)]
    return python_calls.call(sda_ops.hue_saturation, inputs, tf.uint8, image.shape)


def greyscale(image: tf.Tensor) -> tf.Tensor:
    """Sets all channels of a pixel to its grey level."""
    return tf.repeat(tf.cast(_grey_levels(image), tf.uint8)[..., None], 3, axis=-1)


def _jitter(
    image: tf.Tensor, order: tf.Tensor, factors: tf.Tensor, strengths: tuple[float, ...]
) -> tf.Tensor:
    """Applies the four operations in the given order; those of strength 0 change nothing."""
    operations = (brightness, contrast, saturation, hue)

    def branch(kind: int, image: tf.Tensor) -> Callable[[], tf.Tensor]:
        if not strengths[kind]:
            return lambda: image
        return lambda: operations[kind](image, factors[kind])

    def apply_next(position: tf.Tensor, image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        branches = [branch(kind, image) for kind in range(len(operations))]
        changed = tf.switch_case(order[position], branches)
        return position + 1, tf.ensure_shape(changed, image.shape)

    # The loop is in the graph, so that each operation is traced once and not once per position.
    _, image = tf.while_loop(
        lambda position, _: position < len(operations),
        apply_next,
        (tf.constant(0), image),
        parallel_iterations=1,
    )
    return image


def _apply_if(
    is_applied: tf.Tensor, operation: Callable[[tf.Tensor], tf.Tensor], image: tf.Tensor
) -> tf.Tensor:
    return tf.ensure_shape(
        tf.cond(is_applied, lambda: operation(image), lambda: image), image.shape
    )


def _grey_levels(image: tf.Tensor) -> tf.Tensor:
    """Returns the grey level of each pixel, exactly as PIL's mode L: int32 [h, w]."""
    red, green, blue = (tf.cast(plane, tf.int32) for plane in tf.unstack(image, axis=-1))
    return tf.bitwise.right_shift(19595 * red + 38470 * green + 7471 * blue + 2**15, 16)


def _blend(base: tf.Tensor, image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """base + factor * (image - base), rounded down and clipped as PIL's Image.blend: uint8.

    `base` is float32, of integers, and broadcasts to the image.
    """
    blended = base + factor * (tf.cast(image, tf.float32) - base)
    # The cast truncates.
    clipped = tf.raw_ops.ClipByValue(
        t=blended, clip_value_min=tf.constant(0.0), clip_value_max=tf.constant(255.0)
    )
    return tf.cast(clipped, tf.uint8)
