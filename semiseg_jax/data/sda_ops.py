"""The kernels of strong data augmentation that are no look-up: from image and magnitude to image.

Each kernel takes uint8 [H, W, C] and returns a new array of the same shape and type. Results are
rounded and clipped to 0..255. `seed` is the only source of randomness. The point operations are in
`semiseg_jax.data.sda_tables`; `semiseg_jax.data.sda` defines the ranges, draws the magnitudes and
checks the arguments. Where nothing else is said, an image has any number of channels.

The kernels are optimised for one CPU core, because the host augments many images in parallel.
Almost all of their time is spent in OpenCV and NumPy, which then do not hold Python's lock.
"""

import itertools

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Shaped, UInt8
from scipy import special

from semiseg_jax.data import sda_tables, stateless_random
from semiseg_jax.data.sda_tables import Image, empty_like

# OpenCV's own threads would compete with those that augment other images. The setting is that of
# the process, and changes no pixel.
cv2.setNumThreads(1)

# Noise of this many levels saturates every pixel; larger values have the same effect.
_MAX_LEVEL = 255

# Entries of the table of one sign of noise: with the sign, an index has 16 bits.
_NOISE_LEVELS = 32768

# Values of an image that are processed at once in float32, so that they stay in the cache.
_BLOCK_VALUES = 65536

# Linear sRGB to XYZ over the white point D65, so that white is (1, 1, 1).
_XYZ_FROM_LINEAR: Float32[np.ndarray, "3 3"] = np.array(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ],
    np.float32,
) / np.array([[0.950456], [1.0], [1.088754]], np.float32)
_LINEAR_FROM_XYZ = np.linalg.inv(_XYZ_FROM_LINEAR).astype(np.float32)

Scalar = Float[np.ndarray, ""]
SeedArray = Int64[np.ndarray, "2"]


# --- Operations that depend on the histogram -----------------------------------------------------


def equalize(image: Image, lightness: Bool[np.ndarray, ""]) -> Image:
    """Equalises the histogram of each channel, exactly as PIL's ImageOps.equalize.

    With `lightness`, equalises L of CIE Lab instead, as the authors' code does; this takes three
    channels, and is slower by an order of magnitude.
    """
    if lightness:
        return _equalize_lightness(image)
    histogram = np.stack([_histogram(plane) for plane in cv2.split(image)])
    return sda_tables.look_up(image, sda_tables.equalize(histogram))


def _histogram(plane: UInt8[np.ndarray, "h w"]) -> Int64[np.ndarray, "256"]:
    # OpenCV returns float32, which is exact up to 2^24 pixels.
    height = max((1 << 24) // plane.shape[1], 1)
    blocks = [plane[top : top + height] for top in range(0, len(plane), height)]
    counts = [cv2.calcHist([block], [0], None, [256], [0, 256]) for block in blocks]
    return np.stack(counts).astype(np.int64).sum(axis=0).ravel()


def _equalize_lightness(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Equalises L, quantised to 0..255, by OpenCV's rule; a and b remain unchanged."""
    encoded = np.arange(256, dtype=np.float32) / 255
    decoded = np.where(encoded > 0.04045, ((encoded + 0.055) / 1.055) ** 2.4, encoded / 12.92)
    curve = cv2.transform(cv2.LUT(image, decoded.astype(np.float32)), _XYZ_FROM_LINEAR)
    curve = np.where(curve > 0.008856, cv2.pow(curve, 1 / 3), 7.787 * curve + 16 / 116)
    light = 2.55 * (116 * curve[..., 1] - 16)
    levels = np.clip(np.floor(light + 0.5), 0, 255).astype(np.uint8)
    brighter = cv2.equalizeHist(levels).astype(np.float32) - levels
    # a and b are differences of the curve's components, so adding L's change to all three
    # preserves them.
    curve += (brighter / (2.55 * 116))[..., None]
    curve = np.where(curve > 0.206893, curve**3, (curve - 16 / 116) / 7.787)
    linear = np.clip(cv2.transform(curve, _LINEAR_FROM_XYZ), 0, 1)
    result = np.where(linear > 0.0031308, 1.055 * cv2.pow(linear, 1 / 2.4) - 0.055, 12.92 * linear)
    return (255 * result + 0.5).astype(np.uint8)


# --- Operations that mix the channels of a pixel -------------------------------------------------


def invert(
    image: Image, channels: Bool[np.ndarray, " c"], swap_red_blue: Bool[np.ndarray, ""]
) -> Image:
    """255 - x in the channels that are True; `swap_red_blue` then swaps R and B of three."""
    inverted = sda_tables.look_up(image, sda_tables.invert(channels))
    return permute_channels(inverted, np.array([2, 1, 0])) if swap_red_blue else inverted


def permute_channels(image: Image, permutation: Int[np.ndarray, " c"]) -> Image:
    """Channel c of the result is channel permutation[c] of the image."""
    planes = cv2.split(image)
    result = empty_like(image)
    cv2.merge([planes[source] for source in permutation], result)
    return result


def hue_saturation(
    image: UInt8[np.ndarray, "h w 3"], hue: Scalar, saturation: Scalar
) -> UInt8[np.ndarray, "h w 3"]:
    """Shifts hue and saturation of HSV in float; the value remains unchanged.

    255 is the full circle of `hue`, and the full range of `saturation`, which is clipped. A grey
    pixel has hue 0 (red), as in colorsys.
    """
    # OpenCV's hue has 360 degrees, and may exceed them, but not be negative.
    degrees = float(hue) * (360 / 255) % 360
    shift = np.array([degrees, float(saturation) / 255, 0, 0])
    result = empty_like(image)
    height = max(_BLOCK_VALUES // (3 * image.shape[1]), 1)
    for top in range(0, len(image), height):
        block = image[top : top + height].astype(np.float32)
        cv2.cvtColor(block, cv2.COLOR_RGB2HSV, dst=block)
        cv2.add(block, shift, dst=block)
        np.clip(block[..., 1], 0, 1, out=block[..., 1])
        cv2.cvtColor(block, cv2.COLOR_HSV2RGB, dst=block)
        # OpenCV rounds half to even; 2^-12 is more than the error of float32, and rounds half up.
        cv2.convertScaleAbs(block, dst=result[top : top + height], beta=2**-12)
    return result


# --- Operations on neighbourhoods ----------------------------------------------------------------


def gaussian_blur(image: Image, sigma: Scalar) -> Image:
    """Gaussian blur of `sigma` pixels, radius ceil(3 sigma), with replicated borders."""
    deviation = max(float(sigma), 1e-3)
    radius = int(np.ceil(3 * deviation))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    result = empty_like(image)
    # `cv2.GaussianBlur` rounds after each of its two passes, and is slower.
    border = cv2.BORDER_REPLICATE
    cv2.sepFilter2D(image, cv2.CV_8U, taps, taps, dst=result, borderType=border)
    return result


def jpeg_compression(
    image: UInt8[np.ndarray, "h w 3"], quality: Int[np.ndarray, ""]
) -> UInt8[np.ndarray, "h w 3"]:
    """Encodes and decodes at `quality`, 1..100, with 4:2:0 chroma as PIL does."""
    blue_first = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", blue_first, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
    assert decoded is not None
    return decoded


# --- Random operations ---------------------------------------------------------------------------


def gaussian_noise(image: Image, s: Scalar, seed: SeedArray) -> Image:
    """x + N(0, s), independent per pixel and channel."""
    # The noise is rounded half up to a level, and levels 0..k have the probability
    # P(|N(0, s)| < k + 1/2) = erf((k + 1/2) / (s sqrt 2)).
    upper = (np.arange(_MAX_LEVEL) + 0.5) / max(float(s), 1e-9)
    return _add_symmetric_noise(image, special.erf(upper / np.sqrt(2)), seed)


def poisson_noise(image: Image, lam: Scalar, seed: SeedArray) -> Image:
    """x + k or x - k with equal probability, k ~ Poisson(lam), per pixel and channel."""
    return _add_symmetric_noise(image, special.pdtr(np.arange(_MAX_LEVEL), float(lam)), seed)


def _add_symmetric_noise(
    image: Image, cumulative: Float64[np.ndarray, "255"], seed: SeedArray
) -> Image:
    """Adds integer noise of either sign, independent per pixel and channel.

    The image is integer, so rounded(x + noise) = x + rounded(noise). The rounded noise is drawn by
    evaluating its inverse distribution function at 16 random bits. For one sign, the table holds
    the values of this function at one uniform draw within each of its 2^15 intervals. Over seeds,
    the distribution of a pixel's noise is therefore exact, including the tails; within an image,
    every probability is accurate to 2^-16.

    Args:
        image: the image.
        cumulative: probability that the noise has at most k levels, for k = 0..254.
        seed: of all draws.
    """
    generator = stateless_random.generator(seed)
    draws = (np.arange(_NOISE_LEVELS) + generator.random(_NOISE_LEVELS)) / _NOISE_LEVELS
    ends = np.searchsorted(draws, [*cumulative, np.inf])
    levels = np.repeat(np.arange(_MAX_LEVEL + 1, dtype=np.int16), np.diff(ends, prepend=0))
    indices = _random_bits(generator, image, np.uint16)
    noise = cv2.LUT(indices, np.concatenate([levels, -levels]))
    result = empty_like(image)
    cv2.add(_rows(image), noise, dst=_rows(result), dtype=cv2.CV_8U)
    return result


def dropout(image: Image, p: Scalar, seed: SeedArray) -> Image:
    """Sets values to 0 with probability p, independent per pixel and channel."""
    generator = stateless_random.generator(seed)
    # A value is dropped if its random byte is below `threshold`. The remainder of p, less than
    # 1/256, is drawn separately.
    threshold = int(np.clip(np.floor(256 * float(p)), 0, 255))
    rest = (float(p) - threshold / 256) / (1 - threshold / 256)
    draws = _random_bits(generator, image, np.uint8)
    kept = draws >= np.uint8(threshold)
    result = empty_like(image)
    np.multiply(_rows(image), kept.view(np.uint8), out=_rows(result))
    result.reshape(-1)[_random_indices(generator, image.size, rest)] = 0
    return result


def coarse_dropout(image: Image, p: Scalar, cells: Int[np.ndarray, "2"], seed: SeedArray) -> Image:
    """Drops each cell and channel of a grid with probability p.

    The grid of `cells` (down, across) is resized to the image by nearest neighbour with half-pixel
    centres. If it is finer than the image, some cells cover no pixel.
    """
    height, width, channels = image.shape
    down, across = cells.tolist()
    draws = stateless_random.uniform(seed, (down, across, channels))
    mask = np.where(draws >= p, 255, 0).astype(np.uint8)[:, _nearest_cells(width, across)]
    rows, result = _rows(image), empty_like(image)
    ends = np.searchsorted(_nearest_cells(height, down), np.arange(down + 1))
    for cell, (top, bottom) in enumerate(itertools.pairwise(ends)):
        np.bitwise_and(rows[top:bottom], mask[cell].ravel(), out=_rows(result)[top:bottom])
    return result


def _nearest_cells(size: int, cells: int) -> Int64[np.ndarray, " size"]:
    return (2 * np.arange(size) + 1) * cells // (2 * size)


def salt_pepper(image: Image, p: Scalar, seed: SeedArray) -> Image:
    """Replaces values by 255 * Beta(.5, .5) with probability p, per pixel and channel."""
    generator = stateless_random.generator(seed)
    indices = _random_indices(generator, image.size, float(p))
    # sin^2 of a uniform angle has the distribution Beta(.5, .5).
    angles = np.float32(np.pi) * generator.random(len(indices), np.float32)
    result = empty_like(image)
    result[:] = image
    result.reshape(-1)[indices] = (255 * np.sin(angles) ** 2 + np.float32(0.5)).astype(np.uint8)
    return result


def _random_indices(generator: np.random.Generator, size: int, p: float) -> Int64[np.ndarray, " n"]:
    """Draws each of the indices 0..size - 1 with probability p; ascending.

    The distances between drawn indices have a geometric distribution. Drawing the distances costs
    time in proportion to their number.
    """
    if p <= 0:
        return np.zeros(0, np.int64)
    if p >= 1:
        return np.arange(size)
    # The mean number plus six standard deviations, so that the last index exceeds the image.
    count = int(size * p + 6 * np.sqrt(size * p * (1 - p)) + 10)
    # The draws are below 1, and a difference of `size` exceeds the image already.
    gaps = np.log(1 - generator.random(count, np.float32)) / np.float32(np.log1p(-p))
    indices = np.cumsum(np.minimum(gaps, size).astype(np.int64) + 1) - 1
    return indices[: np.searchsorted(indices, size)]


# --- Helpers -------------------------------------------------------------------------------------


def _random_bits(
    generator: np.random.Generator, image: Image, dtype: type[np.unsignedinteger]
) -> Shaped[np.ndarray, "h wc"]:
    """Draws unsigned integers for each value of the image, uniformly, as its rows."""
    count = -(-image.size * np.dtype(dtype).itemsize // 8)
    longs = generator.integers(0, 2**64 - 1, count, np.uint64, endpoint=True)
    return longs.view(dtype)[: image.size].reshape(len(image), -1)


def _rows(image: Image) -> UInt8[np.ndarray, "h wc"]:
    return image.reshape(len(image), -1)
