"""The kernels of strong data augmentation: functions from image and magnitude to image.

Each kernel takes uint8 [H, W, 3] (RGB) and returns the same shape and type. Results are rounded
half up and clipped to 0..255. `seed` is the only source of randomness. `semiseg_jax.data.sda`
defines the ranges, draws the magnitudes and checks the arguments.

The kernels are optimised for one CPU core, because the host augments many images in parallel.
Measurements of TensorFlow's CPU kernels on 769x769x3 values, and their consequences:

- arithmetic takes .3 ms on uint8, .6 on int16, 1.1 on float32: use the narrowest type;
- `tf.where` on images takes 13 ms: select by multiplication or xor with a mask;
- broadcasting [3] over [H, W, 3] takes 4 ms, a row of 1536 over the flat image .4: see `_blocks`;
- the cost of a table lookup depends on the number of elements and not on their width: look up
  pairs of grey levels; `tf.gather_nd` takes 3 ns per element, `tf.gather` 4.5;
- Philox takes 5 ns per 32 bits: draw no more bits than can affect the result.
"""

from typing import Any

import numpy as np

from semiseg_jax.runtime.quiet_tensorflow import tf

# A multiple of 6, so that every block starts with channel R and holds an even number of values.
_BLOCK = 1536

# The channels of the pairs of neighbours in the flat image R G B R G B …:
# (R, G), (B, R), (G, B), (R, G), …
_PAIR_FIRST = np.array([0, 2, 1])
_PAIR_SECOND = np.array([1, 0, 2])

# Shifts and noise of this many levels saturate every pixel; larger values have the same effect.
_MAX_LEVEL = 255

# Linear sRGB to XYZ over the white point D65, so that white is (1, 1, 1).
_XYZ_FROM_LINEAR = np.array(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ],
    np.float32,
) / np.array([[0.950456], [1.0], [1.088754]], np.float32)
_LINEAR_FROM_XYZ = np.linalg.inv(_XYZ_FROM_LINEAR)


# --- Point operations: functions of one value ----------------------------------------------------


def contrast_gamma(image: tf.Tensor, g: tf.Tensor) -> tf.Tensor:
    """255 * (x / 255)^g, g float [3]."""
    levels = tf.range(256, dtype=tf.float64) / 255
    return _look_up(image, _round_table(255 * levels ** _per_channel(g)[:, None]))


def contrast_linear(image: tf.Tensor, a: tf.Tensor) -> tf.Tensor:
    """127 + a * (x - 127), a float [3]."""
    levels = tf.range(256, dtype=tf.float64)
    return _look_up(image, _round_table(127 + _per_channel(a)[:, None] * (levels - 127)))


def multiply(image: tf.Tensor, m: tf.Tensor) -> tf.Tensor:
    """x * m, m float [3]."""
    levels = tf.range(256, dtype=tf.float64)
    return _look_up(image, _round_table(_per_channel(m)[:, None] * levels))


def brightness(image: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
    """x + v, v float [] for all channels or [3], one per channel."""
    # x is an integer, so rounding x + v equals adding the rounded v to x.
    shift = tf.clip_by_value(tf.floor(_per_channel(v) + 0.5), -_MAX_LEVEL, _MAX_LEVEL)
    lowest = _row(tf.maximum(-shift, 0))
    highest = _row(_MAX_LEVEL - tf.maximum(shift, 0))
    # Within these limits the sum is in 0..255, so the wrap-around of uint8 implements negative
    # shifts.
    limited = tf.clip_by_value(_blocks(image), lowest, highest)
    return _unblock(limited + _row(tf.math.floormod(shift, 256.0)), image)


def invert(image: tf.Tensor, channels: tf.Tensor, swap_red_blue: tf.Tensor) -> tf.Tensor:
    """255 - x in the channels, bool [3], that are True; `swap_red_blue`, bool [], swaps R and B."""
    flip = _row(tf.where(channels, 255, 0))
    inverted = _unblock(tf.bitwise.bitwise_xor(_blocks(image), flip), image)
    return _if(
        swap_red_blue, lambda: permute_channels(inverted, tf.constant([2, 1, 0])), lambda: inverted
    )


def solarize(image: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
    """255 - x where x >= t (as in PIL), t float []."""
    threshold = tf.math.ceil(t)
    above = tf.cast(image >= tf.cast(tf.clip_by_value(threshold, 0, 255), tf.uint8), tf.uint8)
    flip = tf.where(threshold > 255, tf.constant(0, tf.uint8), tf.constant(255, tf.uint8))
    return tf.bitwise.bitwise_xor(image, above * flip)


def equalize(image: tf.Tensor, lightness: tf.Tensor) -> tf.Tensor:
    """Equalises the histogram of each channel, exactly as PIL's ImageOps.equalize.

    With `lightness`, bool [], equalises L of CIE Lab instead, as the authors' code does; this is
    slower by an order of magnitude.
    """
    return _if(lightness, lambda: _equalize_lightness(image), lambda: _equalize_channels(image))


def _equalize_channels(image: tf.Tensor) -> tf.Tensor:
    pairs = _pair_indices(image)
    counts = tf.math.bincount(
        tf.reshape(pairs, [-1]), minlength=3 * 65536, maxlength=3 * 65536, dtype=tf.int32
    )
    counts = tf.reshape(counts, [3, 256, 256])
    histogram = tf.gather(tf.reduce_sum(counts, axis=1), np.argsort(_PAIR_FIRST))
    histogram += tf.gather(tf.reduce_sum(counts, axis=2), np.argsort(_PAIR_SECOND))
    padding = (2 * tf.size(pairs) - tf.size(image)) // 3
    histogram -= padding * tf.one_hot(0, 256, dtype=tf.int32)

    # As in PIL, pixels of the highest occurring level do not count towards the step. A step of 0
    # leaves the channel unchanged: it has one level, or fewer than 255 pixels below the highest.
    pixels = tf.reduce_sum(histogram, axis=1, keepdims=True)
    last = tf.reduce_max(tf.where(histogram > 0, tf.range(256), 0), axis=1)
    step = (pixels - tf.gather(histogram, last[:, None], batch_dims=1)) // 255
    below = tf.cumsum(histogram, axis=1, exclusive=True)
    equalized = tf.minimum((step // 2 + below) // tf.maximum(step, 1), 255)
    return _look_up(image, tf.cast(tf.where(step > 0, equalized, tf.range(256)), tf.uint8), pairs)


def _equalize_lightness(image: tf.Tensor) -> tf.Tensor:
    """Equalises L, quantised to 0..255, by OpenCV's rule; a and b remain unchanged."""
    encoded = tf.range(256, dtype=tf.float32) / 255
    decoded = tf.where(encoded > 0.04045, ((encoded + 0.055) / 1.055) ** 2.4, encoded / 12.92)
    pixels = tf.reshape(image, [-1, 3])
    curve = tf.gather(decoded, tf.cast(tf.transpose(pixels), tf.int32))
    curve = tf.matmul(_XYZ_FROM_LINEAR, curve)
    curve = tf.where(curve > 0.008856, curve ** (1 / 3), 7.787 * curve + 16 / 116)
    light = 2.55 * (116 * curve[1] - 16)
    levels = tf.cast(tf.clip_by_value(tf.floor(light + 0.5), 0, 255), tf.int32)
    histogram = tf.math.bincount(tf.reshape(levels, [-1]), minlength=256, maxlength=256)
    first = tf.argmax(histogram > 0)
    others = tf.size(levels) - histogram[first]
    mapped = 255 * (tf.cumsum(histogram) - histogram[first]) / tf.maximum(others, 1)
    mapped = tf.clip_by_value(tf.floor(mapped + 0.5), 0, 255)
    mapped = tf.where(others > 0, mapped, tf.range(256, dtype=mapped.dtype))
    brighter = tf.cast(tf.gather(mapped, levels), tf.float32) - tf.cast(levels, tf.float32)
    # a and b are differences of the curve's components, so adding L's change to all three
    # preserves them.
    curve += brighter / (2.55 * 116)
    curve = tf.where(curve > 0.206893, curve**3, (curve - 16 / 116) / 7.787)
    linear = tf.clip_by_value(tf.matmul(_LINEAR_FROM_XYZ, curve), 0, 1)
    result = tf.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    rounded = tf.cast(255 * result + 0.5, tf.uint8)
    return tf.reshape(tf.transpose(rounded), tf.shape(image))


# --- Operations that mix the channels of a pixel -------------------------------------------------


def permute_channels(image: tf.Tensor, permutation: tf.Tensor) -> tf.Tensor:
    """Channel c of the result is channel permutation[c] of the image, int [3]."""
    # tf.gather on the last axis takes 8 ms. Instead, for each channel of the result, the flat
    # image is shifted so that the source channel is at its position, and the others are masked.
    size = tf.size(image)
    rows = _ceil_div(size, _BLOCK)
    flat = tf.pad(tf.reshape(image, [-1]), [[2, rows * _BLOCK - size + 2]])
    result = tf.zeros([], tf.uint8)
    for channel, source in enumerate(tf.unstack(permutation, num=3)):
        shifted = tf.slice(flat, [2 + source - channel], [rows * _BLOCK])
        result += tf.reshape(shifted, [rows, _BLOCK]) * _row(tf.one_hot(channel, 3))
    return _unblock(result, image)


def hue_saturation(image: tf.Tensor, hue: tf.Tensor, saturation: tf.Tensor) -> tf.Tensor:
    """Shifts hue and saturation of HSV in float; the value remains unchanged.

    Both shifts are float []; 255 is the full circle of hue, and the full range of saturation,
    which is clipped. A grey pixel has hue 0 (red), as in colorsys.

    Let V be the largest channel and C the difference of the largest and the smallest. As a
    function of hue, the drop V - channel of each channel is a trapezoid between 0 and C. A change
    of hue moves the colour along the edges of a cube: at any hue one drop changes, and the others
    are 0 or C. A shift therefore needs neither the hue nor its sector (see `_turn_within_sector`).
    The saturation C / V then scales the drops.
    """
    turn = hue * (6 / 255)
    sectors = tf.round(turn)
    red, green, blue = (tf.cast(plane, tf.float32) for plane in tf.unstack(image, axis=-1))
    # Grey pixels become minimally red, so that no division is by zero. Exact in float32.
    red += 2.0**-12
    value = tf.maximum(tf.maximum(red, green), blue)
    chroma = value - tf.minimum(tf.minimum(red, green), blue)
    drops = [value - red, value - green, value - blue]
    drops = _turn_sectors(drops, chroma, tf.cast(sectors, tf.int32))
    drops = _turn_within_sector(drops, chroma, turn - sectors)
    scale = _clip(chroma + value * (saturation / 255), 0, value) / chroma
    rounded = value + 0.5
    # The cast truncates, and a drop never exceeds the value.
    planes = [tf.reshape(tf.cast(rounded - drop * scale, tf.uint8), [-1]) for drop in drops]
    return tf.reshape(tf.transpose(tf.stack(planes)), tf.shape(image))


def _turn_sectors(drops: list[tf.Tensor], chroma: tf.Tensor, sectors: tf.Tensor) -> list[tf.Tensor]:
    """Turns hue by whole sixths: a permutation of the channels, inverted for odd numbers."""
    red, green, blue = drops

    def inverted(*channels: tf.Tensor) -> list[tf.Tensor]:
        return [chroma - channel for channel in channels]

    turns = [
        lambda: [red, green, blue],
        lambda: inverted(green, blue, red),
        lambda: [blue, red, green],
        lambda: inverted(red, green, blue),
        lambda: [green, blue, red],
        lambda: inverted(blue, red, green),
    ]
    return tf.switch_case(tf.math.floormod(sectors, 6), turns)


def _turn_within_sector(
    drops: list[tf.Tensor], chroma: tf.Tensor, turn: tf.Tensor
) -> list[tf.Tensor]:
    """Turns hue by -.5 to .5 sixths.

    The changing channel moves by the step |turn| * C. If it reaches 0 or C earlier, the next
    channel moves by the remainder of the step.
    """
    red, green, blue = drops
    step = chroma * tf.abs(turn)
    rest = chroma - step
    neighbours = tf.cond(turn >= 0, lambda: [green, blue, red], lambda: [blue, red, green])
    turned = []
    for drop, neighbour in zip(drops, neighbours, strict=True):
        moved = drop + _clip(neighbour, step, rest) - neighbour
        turned.append(_clip(moved, 0, chroma))
    return turned


def _clip(values: tf.Tensor, low: Any, high: tf.Tensor) -> tf.Tensor:
    """Clips float values to limits of their shape or [], in one pass; tf.clip_by_value takes two.

    For integers it is slow, because of mispredicted branches.
    """
    low = tf.cast(low, values.dtype)
    return tf.raw_ops.ClipByValue(t=values, clip_value_min=low, clip_value_max=high)


# --- Operations on neighbourhoods ----------------------------------------------------------------


def gaussian_blur(image: tf.Tensor, sigma: tf.Tensor) -> tf.Tensor:
    """Gaussian blur of `sigma` pixels, float [], radius ceil(3 sigma), with replicated borders."""
    sigma = tf.maximum(tf.cast(sigma, tf.float64), 1e-3)
    radius = tf.cast(tf.math.ceil(3 * sigma), tf.int32)
    offsets = tf.cast(tf.range(-radius, radius + 1), tf.float64)
    taps = tf.exp(-0.5 * (offsets / sigma) ** 2)
    taps = tf.cast(taps / tf.reduce_sum(taps), tf.float32)
    padded = tf.cast(_replicate(_replicate(image, radius, 0), radius, 1), tf.float32)
    # The vertical pass treats all values of a row as channels, which is faster by a third. Both
    # passes need oneDNN, TensorFlow's default on x86; without it they take ten times as long.
    height, width = tf.shape(padded)[0], tf.shape(padded)[1]
    columns = tf.reshape(padded, [1, height, 1, width * 3])
    filters = tf.tile(taps[:, None, None, None], [1, 1, width * 3, 1])
    columns = tf.nn.depthwise_conv2d(columns, filters, [1, 1, 1, 1], "VALID")
    rows = tf.reshape(columns, [1, height - 2 * radius, width, 3])
    filters = tf.tile(taps[None, :, None, None], [1, 1, 3, 1])
    rows = tf.nn.depthwise_conv2d(rows, filters, [1, 1, 1, 1], "VALID")
    # The cast truncates. The taps sum to 1, so the result is in range.
    return tf.cast(rows[0] + 0.5, tf.uint8)


def jpeg_compression(image: tf.Tensor, quality: tf.Tensor) -> tf.Tensor:
    """Encodes and decodes at `quality`, int [] in 1..100, with 4:2:0 chroma as PIL does."""
    encoded = tf.raw_ops.EncodeJpegVariableQuality(images=image, quality=quality)
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


# --- Random operations ---------------------------------------------------------------------------


def gaussian_noise(image: tf.Tensor, s: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """x + N(0, s), independent per pixel and channel; s float []."""
    bits_seed, table_seed = _split(seed)
    upper = -s * tf.math.ndtri(tf.cast(_stratified(table_seed), tf.float32) / 2)
    levels = tf.floor(tf.minimum(upper, _MAX_LEVEL) + 0.5)
    return _add_symmetric_noise(image, levels, bits_seed)


def poisson_noise(image: tf.Tensor, lam: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """x + k or x - k with equal probability, k ~ Poisson(lam), per pixel and channel."""
    bits_seed, table_seed = _split(seed)
    rate = tf.cast(lam, tf.float64)
    counts = tf.range(_MAX_LEVEL + 1, dtype=tf.float64)
    cumulative = tf.cumsum(tf.exp(tf.math.xlogy(counts, rate) - rate - tf.math.lgamma(counts + 1)))
    levels = tf.searchsorted(cumulative, _stratified(table_seed), side="right")
    return _add_symmetric_noise(image, tf.minimum(levels, _MAX_LEVEL), bits_seed)


def _stratified(seed: tf.Tensor) -> tf.Tensor:
    """Draws one value from each of 32768 equal intervals of (0, 1), ascending; float64 [32768]."""
    count = 32768
    jitter = tf.random.stateless_uniform([count], seed, dtype=tf.float64, alg="philox")
    # float64, because a draw that rounds to 1 would exceed the cumulative probability of every
    # count.
    return tf.maximum((tf.range(count, dtype=tf.float64) + jitter) / count, 2.0**-40)


def _add_symmetric_noise(image: tf.Tensor, levels: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Adds integer noise distributed as +-levels, independent per pixel and channel.

    The image is integer, so rounded(x + noise) = x + rounded(noise). The rounded noise is drawn
    by evaluating its inverse distribution function at 16 random bits. For one sign, `levels`
    holds the values of this function at one uniform draw within each of its 2^15 intervals. Over
    seeds, the distribution of a pixel's noise is therefore exact to float32, including the tails;
    within an image, every probability is accurate to 2^-16.

    Args:
        image: uint8 [H, W, 3].
        levels: [32768], integers of any type, 0..255.
        seed: int [2].
    """
    levels = tf.cast(levels, tf.int16)
    signed = tf.concat([levels, -levels], axis=0)
    index = tf.cast(_random_bits(image, seed, tf.uint16), tf.int32)
    noise = tf.gather_nd(signed, index[..., None])
    return tf.saturate_cast(tf.cast(image, tf.int16) + noise, tf.uint8)


def dropout(image: tf.Tensor, p: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Sets values to 0 with probability p, float [], independent per pixel and channel."""
    byte_seed, rest_seed = _split(seed)
    # A value is dropped if its random byte is below `threshold`. The remainder of p, less than
    # 1/256, is drawn separately.
    threshold = tf.clip_by_value(tf.floor(256 * p), 0, 255)
    rest = (p - threshold / 256) / (1 - threshold / 256)
    draws = _random_bits(image, byte_seed, tf.uint8)
    mask = tf.cast(draws >= tf.cast(threshold, tf.uint8), tf.uint8)
    indices = _random_indices(image, rest, rest_seed)
    return _put(image * mask, indices, tf.zeros_like(indices, tf.uint8))


def coarse_dropout(image: tf.Tensor, p: tf.Tensor, cells: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Drops each cell and channel of a grid with probability p, float [].

    The grid of `cells`, int [2] (down, across), is resized to the image by nearest neighbour with
    half-pixel centres. If it is finer than the image, some cells cover no pixel.
    """
    draws = tf.random.stateless_uniform([cells[0], cells[1], 3], seed, alg="philox")
    mask = tf.cast(draws >= p, tf.uint8)
    for axis in (1, 0):
        size = tf.shape(image)[axis]
        nearest = (2 * tf.range(size) + 1) * cells[axis] // (2 * size)
        mask = tf.gather(mask, nearest, axis=axis)
    return image * mask


def salt_pepper(image: tf.Tensor, p: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Replaces values by 255 * Beta(.5, .5) with probability p, float [], per pixel and channel."""
    index_seed, level_seed = _split(seed)
    indices = _random_indices(image, p, index_seed)
    # sin^2 of a uniform angle has the distribution Beta(.5, .5).
    angles = np.pi * tf.random.stateless_uniform(tf.shape(indices), level_seed, alg="philox")
    return _put(image, indices, tf.cast(255 * tf.sin(angles) ** 2 + 0.5, tf.uint8))


def _random_indices(image: tf.Tensor, p: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws each index into the flat image with probability p; int64 [n], ascending.

    The distances between drawn indices have a geometric distribution. Drawing the distances costs
    time in proportion to their number; a draw for every value of the image takes 4 ms.
    """
    size = tf.cast(tf.size(image), tf.float64)
    chance = tf.cast(p, tf.float64)
    # The mean number plus six standard deviations, so that the last index exceeds the image.
    count = size * chance + 6 * tf.sqrt(size * chance * (1 - chance)) + 10
    uniform = tf.random.stateless_uniform([tf.cast(count, tf.int32)], seed, alg="philox")
    gaps = tf.math.log1p(-uniform) / tf.cast(tf.math.log1p(-chance), tf.float32)
    # A chance of 0 yields infinity or 0 / 0, and `tf.minimum` may propagate NaN.
    gaps = tf.where(gaps < tf.cast(size, tf.float32), gaps, tf.cast(size, tf.float32))
    indices = tf.cumsum(tf.cast(gaps, tf.int64) + 1) - 1
    return indices[: tf.searchsorted(indices, [tf.size(image, tf.int64)])[0]]


def _put(image: tf.Tensor, indices: tf.Tensor, levels: tf.Tensor) -> tf.Tensor:
    """Writes `levels`, uint8 [n], at `indices` of the flat image."""
    flat = tf.tensor_scatter_nd_update(tf.reshape(image, [-1]), indices[:, None], levels)
    return tf.reshape(flat, tf.shape(image))


# --- Helpers -------------------------------------------------------------------------------------


def _split(seed: tf.Tensor) -> list[tf.Tensor]:
    return tf.unstack(tf.random.experimental.stateless_split(seed, 2, alg="philox"))


def _random_bits(image: tf.Tensor, seed: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Draws unsigned integers of `dtype` (up to 32 bits) in the image's shape, uniformly."""
    size = tf.size(image)
    words = tf.random.stateless_uniform(
        [_ceil_div(size, 4 // dtype.size)], seed, None, None, tf.uint32, alg="philox"
    )
    integers = tf.reshape(tf.bitcast(words, dtype), [-1])
    return tf.reshape(integers[:size], tf.shape(image))


def _ceil_div(numerator: tf.Tensor, denominator: int) -> tf.Tensor:
    return -(-numerator // denominator)


def _if(condition: tf.Tensor, then, otherwise) -> tf.Tensor:
    """tf.cond that builds only the selected branch if the condition is static."""
    static_condition = tf.get_static_value(condition)
    if static_condition is None:
        return tf.cond(condition, then, otherwise)
    return then() if static_condition else otherwise()


def _per_channel(value: tf.Tensor) -> tf.Tensor:
    """Broadcasts float [] or [3] to float64 [3]."""
    return tf.broadcast_to(tf.cast(value, tf.float64), [3])


def _round_table(levels: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(tf.floor(levels + 0.5), 0, 255), tf.uint8)


def _row(channels: tf.Tensor) -> tf.Tensor:
    """Repeats three values to a row for elementwise operations with `_blocks`: uint8 [_BLOCK]."""
    return tf.tile(tf.cast(channels, tf.uint8), [_BLOCK // 3])


def _blocks(image: tf.Tensor) -> tf.Tensor:
    """Returns the flat image R G B R G B …, zero-padded at its end, as uint8 [rows, _BLOCK]."""
    size = tf.size(image)
    flat = tf.pad(tf.reshape(image, [-1]), [[0, -size % _BLOCK]])
    return tf.reshape(flat, [-1, _BLOCK])


def _unblock(blocks: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """Inverts `_blocks`; `image` provides the shape."""
    return tf.reshape(tf.reshape(blocks, [-1])[: tf.size(image)], tf.shape(image))


def _pair_indices(image: tf.Tensor) -> tf.Tensor:
    """Returns the index of each pair of neighbours in `_pair_table`, int32 [rows, _BLOCK / 2]."""
    pairs = tf.bitcast(tf.reshape(_blocks(image), [-1, _BLOCK // 2, 2]), tf.uint16)
    table = tf.tile(tf.range(3) * 65536, [_BLOCK // 6])
    return tf.cast(pairs, tf.int32) + table


def _pair_table(tables: tf.Tensor) -> tf.Tensor:
    """Applies uint8 tables [3, 256] to every pair of neighbouring channels: uint16 [3 * 65536]."""
    tables = tf.cast(tables, tf.uint16)
    first = tf.gather(tables, _PAIR_FIRST)[:, None, :]
    second = tf.gather(tables, _PAIR_SECOND)[:, :, None]
    return tf.reshape(first + 256 * second, [-1])


def _look_up(image: tf.Tensor, tables: tf.Tensor, pairs: tf.Tensor | None = None) -> tf.Tensor:
    """Applies a table to each channel: channel c becomes tables[c, channel c of the image].

    Args:
        image: uint8 [H, W, 3].
        tables: uint8 [3, 256].
        pairs: `_pair_indices(image)`, if already computed.
    """
    pairs = _pair_indices(image) if pairs is None else pairs
    mapped = tf.gather_nd(_pair_table(tables), pairs[..., None])
    return _unblock(tf.bitcast(mapped, tf.uint8), image)


def _replicate(image: tf.Tensor, radius: tf.Tensor, axis: int) -> tf.Tensor:
    """Repeats the border pixels `radius` times on both sides of an axis."""
    first = tf.gather(image, [0], axis=axis)
    last = tf.gather(image, [tf.shape(image)[axis] - 1], axis=axis)
    sides = tf.repeat(first, radius, axis), tf.repeat(last, radius, axis)
    return tf.concat([sides[0], image, sides[1]], axis)
