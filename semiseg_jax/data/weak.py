"""Weak augmentation: random scale, crop, mirror; and padding. On the host, in tf.data."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from semiseg_jax.data.labels import IGNORE


@dataclasses.dataclass(frozen=True)
class Geometry:
    """One draw of scale, crop and mirror for an image of a size.

    Attributes:
        scaled: (height, width) of the scaled image in pixels, int32 [2].
        corner: the crop's upper left corner in the scaled image, mirrored if it is, int32 [2].
        valid: (height, width) of what the crop holds of it, int32 [2].
        place: the upper left corner of that in the crop, int32 [2]; padding is around it.
        mirrored: left and right are exchanged, bool [].
    """

    scaled: tf.Tensor
    corner: tf.Tensor
    valid: tf.Tensor
    place: tf.Tensor
    mirrored: tf.Tensor


def draw(size: tf.Tensor, seed: tf.Tensor, data_config: Any) -> Geometry:
    """The geometry of one view.

    Args:
        size: int32 [2], (height, width) of the image in pixels.
        seed: int [2]; the result is a pure function of it and the other arguments.
        data_config: `config.data`; `scale`, `crop` and `mirror` are read.
    """
    low, high = data_config.scale
    draws = tf.random.stateless_uniform([6], seed, dtype=tf.float64)
    scale = low + (high - low) * draws[0]
    scaled = tf.maximum(tf.cast(tf.round(scale * tf.cast(size, tf.float64)), tf.int32), 1)
    crop = tf.constant(data_config.crop, tf.int32)
    valid = tf.minimum(scaled, crop)
    # Where the image is larger than the crop, the crop's corner is drawn; where it is smaller,
    # the image's place in the padding.
    return Geometry(
        scaled=scaled,
        corner=tf.cast(draws[1:3] * tf.cast(scaled - valid + 1, tf.float64), tf.int32),
        valid=valid,
        place=tf.cast(draws[3:5] * tf.cast(crop - valid + 1, tf.float64), tf.int32),
        mirrored=draws[5] < 0.5 if data_config.mirror else tf.constant(False),
    )


def random_crop(
    image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor, data_config: Any
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The part of the randomly scaled, mirrored image that falls into a random crop.

    What a resize of the whole image followed by a crop would give, but only the crop's pixels
    are computed. Image: bilinear, half-pixel centres, no antialiasing; label: nearest, by the
    same centres, so that both stay aligned.

    Args:
        image: uint8 [h, w, 3].
        label: uint8 [h, w].
        seed: int [2]; the result is a pure function of it and the other arguments.
        data_config: `config.data`; `scale`, `crop` and `mirror` are read.

    Returns:
        image uint8 [vh, vw, 3], label uint8 [vh, vw], no larger than the crop; and the place
        of their upper left corner in the crop, int32 [2]. `pad` fills the rest.
    """
    size = tf.shape(label)
    geometry = draw(size, seed, data_config)
    centres = []
    for axis in (0, 1):
        index = tf.range(geometry.valid[axis]) + geometry.corner[axis]
        if axis == 1:
            mirrored = geometry.scaled[1] - 1 - index
            index = tf.where(geometry.mirrored, mirrored, index)
        ratio = tf.cast(size[axis], tf.float64) / tf.cast(geometry.scaled[axis], tf.float64)
        centres.append((tf.cast(index, tf.float64) + 0.5) * ratio - 0.5)
    return _bilinear(image, *centres), _nearest(label, *centres), geometry.place


def pad(
    image: tf.Tensor, label: tf.Tensor, place: tf.Tensor, crop: tuple[int, int], colour: np.ndarray
) -> tuple[tf.Tensor, tf.Tensor]:
    """Image and label in a canvas of the crop's size: mean colour around, label IGNORE.

    Args:
        image: uint8 [vh, vw, 3].
        label: uint8 [vh, vw].
        place: int32 [2], the upper left corner in the canvas.
        crop: (height, width) of the canvas.
        colour: uint8 [3].
    """
    after = tf.constant(crop, tf.int32) - tf.shape(label) - place
    paddings = tf.stack([place, after], axis=1)
    canvas = tf.pad(label, paddings, constant_values=IGNORE)
    inside = tf.pad(tf.ones_like(label, tf.bool), paddings)
    image = tf.pad(image, tf.concat([paddings, [[0, 0]]], axis=0))
    image = tf.where(inside[..., None], image, tf.constant(colour, tf.uint8))
    return tf.ensure_shape(image, (*crop, 3)), tf.ensure_shape(canvas, crop)


def _bilinear(image: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """Samples uint8 [h, w, 3] at the grid of float64 centres, clamped to the image."""
    size = tf.shape(image)
    (top, bottom, down), (left, right, along) = (
        _neighbours(c, size[axis]) for axis, c in enumerate((rows, columns))
    )
    # Only the rows and columns that the crop touches become float. Pixels are gathered as whole
    # lines: a gather by column copies three values at a time, which costs more than transposing.
    # The ends of each: a mirrored crop runs backwards.
    first_row, first = (tf.minimum(i[0], i[-1]) for i in (top, left))
    last_row, last = (tf.maximum(i[0], i[-1]) for i in (bottom, right))
    width = last + 1 - first
    strip = tf.cast(image[first_row : last_row + 1, first : last + 1], tf.float32)
    strip = tf.reshape(strip, [-1, 3 * width])
    upper, lower = tf.gather(strip, top - first_row), tf.gather(strip, bottom - first_row)
    lines = tf.transpose(upper + (lower - upper) * down[:, None])
    columns_of = tf.reshape(lines, [width, -1])
    start, end = tf.gather(columns_of, left - first), tf.gather(columns_of, right - first)
    mixed = tf.cast(tf.round(start + (end - start) * along[:, None]), tf.uint8)
    height = tf.shape(rows)[0]
    return tf.reshape(tf.transpose(tf.reshape(mixed, [-1, height])), [height, -1, 3])


def _neighbours(centres: tf.Tensor, size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Indices of the pixels before and after each centre, and the weight of the latter."""
    centres = tf.clip_by_value(centres, 0, tf.cast(size - 1, tf.float64))
    before = tf.cast(tf.floor(centres), tf.int32)
    after = tf.minimum(before + 1, size - 1)
    return before, after, tf.cast(centres - tf.floor(centres), tf.float32)


def _nearest(label: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """Samples uint8 [h, w] at the grid of centres: the pixel that each falls into."""
    size = tf.shape(label)
    for axis, centres in enumerate((rows, columns)):
        index = tf.cast(tf.floor(centres + 0.5), tf.int32)
        label = tf.gather(label, tf.clip_by_value(index, 0, size[axis] - 1), axis=axis)
    return label
