"""Weak augmentation on the host, in tf.data: random scale, crop and mirror, and padding."""

import dataclasses
from typing import Any

import numpy as np

from semiseg_jax.data.image_io import IGNORE
from semiseg_jax.runtime.quiet_tensorflow import tf


@dataclasses.dataclass(frozen=True)
class Geometry:
    """One draw of scale, crop and mirror for an image of a given size.

    Attributes:
        scaled: (height, width) of the scaled image in pixels, int32 [2].
        corner: (top, left) of the crop in the scaled image, which is mirrored first if `mirrored`,
            int32 [2].
        valid: (height, width) of the crop's part inside the image, int32 [2].
        offset: (top, left) of this part in the crop, int32 [2]; padding surrounds it.
        mirrored: whether left and right are exchanged, bool [].
    """

    scaled: tf.Tensor
    corner: tf.Tensor
    valid: tf.Tensor
    offset: tf.Tensor
    mirrored: tf.Tensor


def draw(size: tf.Tensor, seed: tf.Tensor, data_config: Any) -> Geometry:
    """Draws the geometry of one view.

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
    # In a dimension where the image exceeds the crop, the corner of the crop is random; where it
    # is smaller, the offset of the image in the padding is.
    return Geometry(
        scaled=scaled,
        corner=tf.cast(draws[1:3] * tf.cast(scaled - valid + 1, tf.float64), tf.int32),
        valid=valid,
        offset=tf.cast(draws[3:5] * tf.cast(crop - valid + 1, tf.float64), tf.int32),
        mirrored=draws[5] < 0.5 if data_config.mirror else tf.constant(False),
    )


def draw_whole(size: tf.Tensor, seed: tf.Tensor, data_config: Any) -> Geometry:
    """Returns the geometry that shows the whole image, as large as the crop holds it.

    Only the mirror is drawn, by the same draw as in `draw`, so that a view of an image is one of
    two. The image is in the upper left corner of the crop.

    Args:
        size: int32 [2], (height, width) of the image in pixels.
        seed: int [2], as for `draw`.
        data_config: `config.data`; `crop` and `mirror` are read.
    """
    crop = tf.constant(data_config.crop, tf.int32)
    scale = tf.reduce_min(tf.cast(crop, tf.float64) / tf.cast(size, tf.float64))
    scaled = tf.cast(tf.round(scale * tf.cast(size, tf.float64)), tf.int32)
    scaled = tf.clip_by_value(scaled, 1, crop)
    zero = tf.zeros_like(scaled)
    return Geometry(scaled, zero, scaled, zero, draw(size, seed, data_config).mirrored)


def draw_view(
    size: tf.Tensor, strong: tf.Tensor | bool, seed: tf.Tensor, data_config: Any
) -> Geometry:
    """Returns the geometry of a view of a stream: `draw`, or `draw_whole` of a cached weak view.

    Args:
        size, seed: as for `draw`.
        strong: bool [], whether the view belongs to the strong stream.
        data_config: `config.data`; `cache_features` is read too.
    """
    drawn = draw(size, seed, data_config)
    if not data_config.cache_features:
        return drawn
    whole = draw_whole(size, seed, data_config)
    fields = [field.name for field in dataclasses.fields(Geometry)]
    return Geometry(**{f: tf.where(strong, getattr(drawn, f), getattr(whole, f)) for f in fields})


def around_rare(
    geometry: Geometry, label: tf.Tensor, class_weights: tf.Tensor, seed: tf.Tensor
) -> Geometry:
    """Moves a crop so that it contains a pixel of a class that is drawn with these weights.

    A class is drawn among those in the scaled label, then one of its pixels, then the corner of the
    crop among all that contain this pixel, the latter two uniformly. A label without a class of
    weight above 0 keeps its crop.

    Args:
        geometry: from `draw`, for the size of this label.
        label: uint8 [h, w].
        class_weights: float64 [classes], at least 0.
        seed: int [2]; the result is a pure function of it and the other arguments.
    """
    classes, size = tf.shape(class_weights)[0], tf.shape(label)
    # A smaller scale samples some pixels alone; a larger one samples each.
    grid = tf.minimum(geometry.scaled, size)
    steps = tf.cast(size, tf.float64) / tf.cast(grid, tf.float64)
    rows, columns = ((tf.range(grid[i], dtype=tf.float64) + 0.5) * steps[i] - 0.5 for i in (0, 1))
    label = _nearest(label, rows, columns)
    counts = tf.math.bincount(tf.reshape(tf.cast(label, tf.int32), [-1]), minlength=256)
    ends = tf.cumsum(tf.where(counts[:classes] > 0, class_weights, 0))

    def moved() -> tf.Tensor:
        draws = tf.random.stateless_uniform([4], seed, dtype=tf.float64)
        drawn = tf.reduce_sum(tf.cast(ends <= draws[0] * ends[-1], tf.int32))
        pixels = tf.where(label == tf.cast(drawn, tf.uint8))
        number = tf.cast(draws[1] * tf.cast(tf.shape(pixels)[0], tf.float64), tf.int32)
        ratio = tf.cast(geometry.scaled, tf.float64) / tf.cast(grid, tf.float64)
        place = tf.cast((tf.cast(pixels[number], tf.float64) + 0.5) * ratio, tf.int32)
        mirrored = tf.stack([place[0], geometry.scaled[1] - 1 - place[1]])
        place = tf.where(geometry.mirrored, mirrored, place)
        first = tf.maximum(place - geometry.valid + 1, 0)
        last = tf.minimum(place, geometry.scaled - geometry.valid)
        return first + tf.cast(draws[2:] * tf.cast(last - first + 1, tf.float64), tf.int32)

    corner = tf.cond(ends[-1] > 0, moved, lambda: geometry.corner)
    return dataclasses.replace(geometry, corner=corner)


def random_crop(
    image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor, data_config: Any
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns `crop` of an image and its label by the geometry that `draw` draws."""
    return crop(image, label, draw(tf.shape(label), seed, data_config))


def crop(
    image: tf.Tensor, label: tf.Tensor, geometry: Geometry
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the part of the scaled and mirrored image inside a crop.

    The result equals a resize of the whole image followed by a crop, but only the pixels of the
    crop are computed. The image is resampled bilinearly with half-pixel centres and without
    antialiasing, the label by nearest neighbour at the same centres, so that both stay aligned.

    Args:
        image: uint8 [h, w, 3].
        label: uint8 [h, w].
        geometry: from `draw` or `draw_view`, for the size of this image.

    Returns:
        image uint8 [vh, vw, 3] and label uint8 [vh, vw], no larger than the crop; and their
        (top, left) in the crop, int32 [2]. `pad` fills the rest.
    """
    size = tf.shape(label)
    centres = []
    for axis in (0, 1):
        index = tf.range(geometry.valid[axis]) + geometry.corner[axis]
        if axis == 1:
            mirrored = geometry.scaled[1] - 1 - index
            index = tf.where(geometry.mirrored, mirrored, index)
        ratio = tf.cast(size[axis], tf.float64) / tf.cast(geometry.scaled[axis], tf.float64)
        centres.append((tf.cast(index, tf.float64) + 0.5) * ratio - 0.5)
    return _bilinear(image, *centres), _nearest(label, *centres), geometry.offset


def pad(
    image: tf.Tensor,
    label: tf.Tensor,
    offset: tf.Tensor,
    crop: tuple[int, int],
    pad_value: np.ndarray,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Pads image and label to the size of the crop: with `pad_value` and with IGNORE.

    Args:
        image: uint8 [vh, vw, 3].
        label: uint8 [vh, vw].
        offset: (top, left) in the crop, int32 [2].
        crop: (height, width) in pixels.
        pad_value: RGB, uint8 [3].

    Returns:
        image uint8 [crop, 3] and label uint8 [crop].
    """
    after = tf.constant(crop, tf.int32) - tf.shape(label) - offset
    paddings = tf.stack([offset, after], axis=1)
    padded_label = tf.pad(label, paddings, constant_values=IGNORE)
    inside = tf.pad(tf.ones_like(label, tf.bool), paddings)
    image = tf.pad(image, tf.concat([paddings, [[0, 0]]], axis=0))
    image = tf.where(inside[..., None], image, tf.constant(pad_value, tf.uint8))
    return tf.ensure_shape(image, (*crop, 3)), tf.ensure_shape(padded_label, crop)


def _bilinear(image: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """Samples an image, uint8 [h, w, 3], at a grid of float64 centres, clamped to the image."""
    size = tf.shape(image)
    (top, bottom, row_weight), (left, right, column_weight) = (
        _neighbours(c, size[axis]) for axis, c in enumerate((rows, columns))
    )
    # Only the rows and columns that the crop touches are converted to float. Pixels are gathered
    # as whole lines: a gather by column copies three values at a time, which costs more than the
    # transposes. Both ends are compared, because the indices of a mirrored crop descend.
    first_row, first_column = (tf.minimum(i[0], i[-1]) for i in (top, left))
    last_row, last_column = (tf.maximum(i[0], i[-1]) for i in (bottom, right))
    width = last_column + 1 - first_column
    window = image[first_row : last_row + 1, first_column : last_column + 1]
    window = tf.reshape(tf.cast(window, tf.float32), [-1, 3 * width])
    upper, lower = tf.gather(window, top - first_row), tf.gather(window, bottom - first_row)
    transposed = tf.transpose(upper + (lower - upper) * row_weight[:, None])
    by_column = tf.reshape(transposed, [width, -1])
    start, end = (tf.gather(by_column, i - first_column) for i in (left, right))
    samples = tf.cast(tf.round(start + (end - start) * column_weight[:, None]), tf.uint8)
    height = tf.shape(rows)[0]
    return tf.reshape(tf.transpose(tf.reshape(samples, [-1, height])), [height, -1, 3])


def _neighbours(centres: tf.Tensor, size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the indices of the pixels before and after each centre, and the latter's weight."""
    centres = tf.clip_by_value(centres, 0, tf.cast(size - 1, tf.float64))
    before = tf.cast(tf.floor(centres), tf.int32)
    after = tf.minimum(before + 1, size - 1)
    return before, after, tf.cast(centres - tf.floor(centres), tf.float32)


def _nearest(label: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """Samples a label, uint8 [h, w], at a grid of centres: the pixel that contains each centre."""
    size = tf.shape(label)
    for axis, centres in enumerate((rows, columns)):
        index = tf.cast(tf.floor(centres + 0.5), tf.int32)
        label = tf.gather(label, tf.clip_by_value(index, 0, size[axis] - 1), axis=axis)
    return label
