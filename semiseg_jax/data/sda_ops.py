"""The kernels of strong data augmentation: image and magnitude in, image out.

Each takes uint8 [H, W, 3] (RGB) and returns the same shape and type. Results are rounded half up
and clipped to 0..255. Randomness comes in through `seed` alone. `semiseg_jax.data.sda` draws the
magnitudes, names the ranges, and checks the arguments.

They are written for one CPU core, because the host augments many images at once. What that taught
about TensorFlow's CPU kernels, for 769x769x3 values:

- arithmetic on uint8 takes .3 ms, on int16 .6, on float32 1.1: work in the narrowest type;
- `tf.where` on images takes 13 ms: select with masks that are multiplied or xor-ed;
- broadcasting [3] over [H, W, 3] takes 4 ms, a row of 1536 over the flat image .4: `_blocks`;
- looking up costs by the element, whatever the element's width: look up pairs of grey levels;
  `tf.gather_nd` takes 3 ns an element, `tf.gather` 4.5;
- Philox takes 5 ns per 32 bits: draw no more bits than the result can show.
"""

from typing import Any

import numpy as np
import tensorflow as tf

# A multiple of 6, so that every block starts with the same channel and holds whole pairs.
_BLOCK = 1536

# In the flat image R G B R G B …, pairs of neighbours are (R, G), (B, R), (G, B), (R, G), …
_PAIR_FIRST = np.array([0, 2, 1])
_PAIR_SECOND = np.array([1, 0, 2])

# Shifts and noise of this many levels saturate every pixel: larger ones need not be told apart.
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


# --- Point operations: each grey level of a channel goes to one grey level -----------------------


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
    """x + v, v float [] for all channels or [3] for each."""
    # x is an integer: x + v rounded is x plus v rounded.
    shift = tf.clip_by_value(tf.floor(_per_channel(v) + 0.5), -_MAX_LEVEL, _MAX_LEVEL)
    lowest = _row(tf.maximum(-shift, 0))
    highest = _row(_MAX_LEVEL - tf.maximum(shift, 0))
    # Within these limits the sum stays in 0..255, and uint8's wrap-around subtracts as well.
    limited = tf.clip_by_value(_blocks(image), lowest, highest)
    return _unblock(limited + _row(tf.math.floormod(shift, 256.0)), image)


def invert(image: tf.Tensor, channels: tf.Tensor, swap_red_blue: tf.Tensor) -> tf.Tensor:
    """255 - x on the chosen channels, bool [3]; bool [] `swap_red_blue` exchanges R and B."""
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
    """Histogram equalisation of each channel, exactly as PIL's ImageOps.equalize.

    With bool [] `lightness`, that of L in CIE Lab instead, as in the authors' code; slower by an
    order of magnitude.
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

    # PIL: the last level that occurs does not count towards the step; a step of 0 (a channel of
    # one level, or fewer than 255 pixels below the last) leaves the channel as it is.
    pixels = tf.reduce_sum(histogram, axis=1, keepdims=True)
    last = tf.reduce_max(tf.where(histogram > 0, tf.range(256), 0), axis=1)
    step = (pixels - tf.gather(histogram, last[:, None], batch_dims=1)) // 255
    below = tf.cumsum(histogram, axis=1, exclusive=True)
    equalized = tf.minimum((step // 2 + below) // tf.maximum(step, 1), 255)
    return _look_up(image, tf.cast(tf.where(step > 0, equalized, tf.range(256)), tf.uint8), pairs)


def _equalize_lightness(image: tf.Tensor) -> tf.Tensor:
    """Equalises L, quantised to 0..255, by OpenCV's rule; a and b stay as they are."""
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
    # a and b are differences of the curve's components: all three move by as much as L's does.
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
    # image is shifted so that the wanted channel falls on it, and the others are masked out.
    size = tf.size(image)
    rows = _ceil_div(size, _BLOCK)
    flat = tf.pad(tf.reshape(image, [-1]), [[2, rows * _BLOCK - size + 2]])
    result = tf.zeros([], tf.uint8)
    for channel, source in enumerate(tf.unstack(permutation, num=3)):
        shifted = tf.slice(flat, [2 + source - channel], [rows * _BLOCK])
        result += tf.reshape(shifted, [rows, _BLOCK]) * _row(tf.one_hot(channel, 3))
    return _unblock(result, image)


def hue_saturation(image: tf.Tensor, hue: tf.Tensor, saturation: tf.Tensor) -> tf.Tensor:
    """Shifts hue and saturation of HSV, in float; the value stays.

    Both shifts are float [] in units where 255 is the full circle of hue, and the whole range of
    saturation, which is clipped. A grey pixel has hue 0 (red), as in colorsys.

    With V the largest channel and C = V - the smallest, each channel's drop V - channel, as a
    function of hue, is a trapezoid between 0 and C, and the hue moves along the edges of a cube:
    at any hue one channel is moving, the others rest at 0 or C. So a shift needs neither hue nor
    sectors: see `_turn`. Saturation C / V then scales the drops.
    """
    turn = hue * (6 / 255)
    sectors = tf.round(turn)
    red, green, blue = (tf.cast(plane, tf.float32) for plane in tf.unstack(image, axis=-1))
    # Makes grey pixels the faintest red, and spares all divisions the zero. Exact in float32.
    red += 2.0**-12
    value = tf.maximum(tf.maximum(red, green), blue)
    chroma = value - tf.minimum(tf.minimum(red, green), blue)
    drops = [value - red, value - green, value - blue]
    drops = _turn_sectors(drops, chroma, tf.cast(sectors, tf.int32))
    drops = _turn(drops, chroma, turn - sectors)
    scale = _clip(chroma + value * (saturation / 255), 0, value) / chroma
    rounded = value + 0.5
    # The cast truncates, and a drop never exceeds the value.
    planes = [tf.reshape(tf.cast(rounded - drop * scale, tf.uint8), [-1]) for drop in drops]
    return tf.reshape(tf.transpose(tf.stack(planes)), tf.shape(image))


def _turn_sectors(drops: list[tf.Tensor], chroma: tf.Tensor, sectors: tf.Tensor) -> list[tf.Tensor]:
    """Turns hue by whole sixths: an exchange of channels, inverted for odd ones."""
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


def _turn(drops: list[tf.Tensor], chroma: tf.Tensor, turn: tf.Tensor) -> list[tf.Tensor]:
    """Turns hue by -.5 to .5 sixths.

    The moving channel takes the step |turn| * C. When it comes to its end, which the neighbour on
    the far side sees as a drop within a step of 0 or C, that neighbour moves by the rest.
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
    """Float values within limits of their shape or []; one pass, tf.clip_by_value takes two.

    Not for integers, where it mispredicts branches.
    """
    low = tf.cast(low, values.dtype)
    return tf.raw_ops.ClipByValue(t=values, clip_value_min=low, clip_value_max=high)


# --- Operations on neighbourhoods ----------------------------------------------------------------


def gaussian_blur(image: tf.Tensor, sigma: tf.Tensor) -> tf.Tensor:
    """Gaussian of `sigma` pixels, float [], radius ceil(3 sigma), the border replicated."""
    sigma = tf.maximum(tf.cast(sigma, tf.float64), 1e-3)
    radius = tf.cast(tf.math.ceil(3 * sigma), tf.int32)
    offsets = tf.cast(tf.range(-radius, radius + 1), tf.float64)
    taps = tf.exp(-0.5 * (offsets / sigma) ** 2)
    taps = tf.cast(taps / tf.reduce_sum(taps), tf.float32)
    padded = tf.cast(_replicate(_replicate(image, radius, 0), radius, 1), tf.float32)
    # Down the columns, a row's values are as many channels: the faster form by a third. Both need
    # oneDNN, TensorFlow's default on x86; without it they take ten times as long.
    height, width = tf.shape(padded)[0], tf.shape(padded)[1]
    columns = tf.reshape(padded, [1, height, 1, width * 3])
    filters = tf.tile(taps[:, None, None, None], [1, 1, width * 3, 1])
    columns = tf.nn.depthwise_conv2d(columns, filters, [1, 1, 1, 1], "VALID")
    rows = tf.reshape(columns, [1, height - 2 * radius, width, 3])
    filters = tf.tile(taps[None, :, None, None], [1, 1, 3, 1])
    rows = tf.nn.depthwise_conv2d(rows, filters, [1, 1, 1, 1], "VALID")
    # The cast truncates; taps that sum to 1 stay in range.
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
    """x + k or x - k with even odds, k ~ Poisson(lam), independent per pixel and channel."""
    bits_seed, table_seed = _split(seed)
    rate = tf.cast(lam, tf.float64)
    counts = tf.range(_MAX_LEVEL + 1, dtype=tf.float64)
    cumulative = tf.cumsum(tf.exp(tf.math.xlogy(counts, rate) - rate - tf.math.lgamma(counts + 1)))
    levels = tf.searchsorted(cumulative, _stratified(table_seed), side="right")
    return _add_symmetric_noise(image, tf.minimum(levels, _MAX_LEVEL), bits_seed)


def _stratified(seed: tf.Tensor) -> tf.Tensor:
    """One uniform draw from each of 32768 equal parts of (0, 1), in order; float64 [32768]."""
    parts = 32768
    jitter = tf.random.stateless_uniform([parts], seed, dtype=tf.float64, alg="philox")
    # float64, because a draw that were rounded to 1 would lie beyond every count.
    return tf.maximum((tf.range(parts, dtype=tf.float64) + jitter) / parts, 2.0**-40)


def _add_symmetric_noise(image: tf.Tensor, levels: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Adds integer noise that is distributed as +-levels, each pixel and channel on its own.

    Image and result are integers, so that rounded(x + noise) = x + rounded(noise): what is drawn
    is the rounded noise, by its inverse distribution function at 16 random bits. `levels` holds
    that function's values at a fresh uniform draw within each of its 2^15 steps, for one sign.
    Hence the distribution of any pixel's noise over seeds is exact to float32, tails included,
    and within one image every probability is met to 2^-16.

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
    """0 with probability p, float []; each pixel and channel on its own."""
    byte_seed, rest_seed = _split(seed)
    # A random byte below `threshold` drops; what 256ths of p leave over, rare, is drawn apart.
    threshold = tf.clip_by_value(tf.floor(256 * p), 0, 255)
    rest = (p - threshold / 256) / (1 - threshold / 256)
    draws = _random_bits(image, byte_seed, tf.uint8)
    kept = tf.cast(draws >= tf.cast(threshold, tf.uint8), tf.uint8)
    places = _places(image, rest, rest_seed)
    return _put(image * kept, places, tf.zeros_like(places, tf.uint8))


def coarse_dropout(image: tf.Tensor, p: tf.Tensor, cells: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Drops each cell and channel of a grid with probability p; float [].

    The grid of `cells`, int [2] (down, across), is enlarged to the image by nearest, half-pixel
    centres; where it is finer than the image, some cells fall between the pixels.
    """
    draws = tf.random.stateless_uniform([cells[0], cells[1], 3], seed, alg="philox")
    kept = tf.cast(draws >= p, tf.uint8)
    for axis in (1, 0):
        size = tf.shape(image)[axis]
        nearest = (2 * tf.range(size) + 1) * cells[axis] // (2 * size)
        kept = tf.gather(kept, nearest, axis=axis)
    return image * kept


def salt_pepper(image: tf.Tensor, p: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Replaced by 255 * Beta(.5, .5) with probability p, float []; each channel on its own."""
    place_seed, level_seed = _split(seed)
    places = _places(image, p, place_seed)
    # sin^2 of a uniform angle has the distribution Beta(.5, .5).
    angles = np.pi * tf.random.stateless_uniform(tf.shape(places), level_seed, alg="philox")
    return _put(image, places, tf.cast(255 * tf.sin(angles) ** 2 + 0.5, tf.uint8))


def _places(image: tf.Tensor, p: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Indices into the flat image, ascending, each chosen with probability p; int64 [chosen].

    The distances between chosen ones are geometric: drawing these costs by their number, where
    a draw for every value of the image takes 4 ms.
    """
    size = tf.cast(tf.size(image), tf.float64)
    chance = tf.cast(p, tf.float64)
    # Six standard deviations more than are expected, so that the last one lies beyond the image.
    enough = size * chance + 6 * tf.sqrt(size * chance * (1 - chance)) + 10
    uniform = tf.random.stateless_uniform([tf.cast(enough, tf.int32)], seed, alg="philox")
    gaps = tf.math.log1p(-uniform) / tf.cast(tf.math.log1p(-chance), tf.float32)
    # A chance of 0 gives infinite gaps, or 0 / 0, which `minimum` may pass on.
    gaps = tf.where(gaps < tf.cast(size, tf.float32), gaps, tf.cast(size, tf.float32))
    places = tf.cumsum(tf.cast(gaps, tf.int64) + 1) - 1
    return places[: tf.searchsorted(places, [tf.size(image, tf.int64)])[0]]


def _put(image: tf.Tensor, places: tf.Tensor, levels: tf.Tensor) -> tf.Tensor:
    """The image with `levels`, uint8 [n], at `places` of the flat image."""
    flat = tf.tensor_scatter_nd_update(tf.reshape(image, [-1]), places[:, None], levels)
    return tf.reshape(flat, tf.shape(image))


# --- What the kernels share ----------------------------------------------------------------------


def _split(seed: tf.Tensor) -> list[tf.Tensor]:
    return tf.unstack(tf.random.experimental.stateless_split(seed, 2, alg="philox"))


def _random_bits(image: tf.Tensor, seed: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Unsigned integers of up to 32 bits and the image's shape, uniform over all their values."""
    size = tf.size(image)
    words = tf.random.stateless_uniform(
        [_ceil_div(size, 4 // dtype.size)], seed, None, None, tf.uint32, alg="philox"
    )
    parts = tf.reshape(tf.bitcast(words, dtype), [-1])
    return tf.reshape(parts[:size], tf.shape(image))


def _ceil_div(numerator: tf.Tensor, denominator: int) -> tf.Tensor:
    return -(-numerator // denominator)


def _if(condition: tf.Tensor, then, otherwise) -> tf.Tensor:
    """tf.cond that builds one branch only where the condition is known."""
    known = tf.get_static_value(condition)
    if known is None:
        return tf.cond(condition, then, otherwise)
    return then() if known else otherwise()


def _per_channel(value: tf.Tensor) -> tf.Tensor:
    """float64 [3] of float [] or [3]."""
    return tf.broadcast_to(tf.cast(value, tf.float64), [3])


def _round_table(levels: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(tf.floor(levels + 0.5), 0, 255), tf.uint8)


def _row(channels: tf.Tensor) -> tf.Tensor:
    """uint8 [_BLOCK], the three values repeated: what to combine `_blocks` with."""
    return tf.tile(tf.cast(channels, tf.uint8), [_BLOCK // 3])


def _blocks(image: tf.Tensor) -> tf.Tensor:
    """uint8 [rows, _BLOCK]: the flat image, R G B R G B …, padded with zeros at its end."""
    size = tf.size(image)
    flat = tf.pad(tf.reshape(image, [-1]), [[0, -size % _BLOCK]])
    return tf.reshape(flat, [-1, _BLOCK])


def _unblock(blocks: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """The inverse of `_blocks`; takes the size from `image`."""
    return tf.reshape(tf.reshape(blocks, [-1])[: tf.size(image)], tf.shape(image))


def _pair_indices(image: tf.Tensor) -> tf.Tensor:
    """int32 [rows, _BLOCK / 2]: the place of each pair of neighbours in `_pair_table`."""
    pairs = tf.bitcast(tf.reshape(_blocks(image), [-1, _BLOCK // 2, 2]), tf.uint16)
    table = tf.tile(tf.range(3) * 65536, [_BLOCK // 6])
    return tf.cast(pairs, tf.int32) + table


def _pair_table(tables: tf.Tensor) -> tf.Tensor:
    """uint16 [3 * 65536]: uint8 [3, 256] applied to every pair of neighbouring channels."""
    tables = tf.cast(tables, tf.uint16)
    first = tf.gather(tables, _PAIR_FIRST)[:, None, :]
    second = tf.gather(tables, _PAIR_SECOND)[:, :, None]
    return tf.reshape(first + 256 * second, [-1])


def _look_up(image: tf.Tensor, tables: tf.Tensor, pairs: tf.Tensor | None = None) -> tf.Tensor:
    """Channel c of the result is tables[c, channel c of the image].

    Args:
        image: uint8 [H, W, 3].
        tables: uint8 [3, 256].
        pairs: `_pair_indices(image)`, where it is already known.
    """
    pairs = _pair_indices(image) if pairs is None else pairs
    mapped = tf.gather_nd(_pair_table(tables), pairs[..., None])
    return _unblock(tf.bitcast(mapped, tf.uint8), image)


def _replicate(image: tf.Tensor, radius: tf.Tensor, axis: int) -> tf.Tensor:
    """The image with its border pixels repeated `radius` times on both sides of the axis."""
    first = tf.gather(image, [0], axis=axis)
    last = tf.gather(image, [tf.shape(image)[axis] - 1], axis=axis)
    sides = tf.repeat(first, radius, axis), tf.repeat(last, radius, axis)
    return tf.concat([sides[0], image, sides[1]], axis)
