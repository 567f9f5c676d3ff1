"""Strong augmentation against PIL, OpenCV, SciPy, colorsys and values computed by hand."""

import colorsys
import dataclasses
import functools
import hashlib
import io
import types

import cv2
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps
from scipy import ndimage, stats

from semiseg_jax.data.sda import OPS, sample_ops, strong_augment

SIZES = [(1, 1), (1, 7), (7, 1), (33, 20), (50, 41)]
RANDOM = ["noise_gau", "noise_pos", "dropout", "coarse_dropout", "salt_pepper"]

# The (uniform, released) ranges in the table of docs/method.md, both ends included.
RANGES = {
    ("contrast_gamma", "g"): ((0.5, 1.5), (1.013, 1.013)),
    ("contrast_linear", "a"): ((0.5, 2), (1.269, 1.269)),
    ("brightness", "v"): ((-20, 50), (16, 16)),
    ("brightness_channel", "v"): ((-20, 50), (16, 16)),
    ("hsv", "hue"): ((-20, 20), (0, 0)),
    ("hsv", "saturation"): ((-20, 20), (0, 0)),
    ("blur", "sigma"): ((0.5, 2), (1.756, 1.756)),
    ("noise_gau", "s"): ((7.65, 20.4), (14.2, 14.2)),
    ("noise_pos", "lam"): ((10, 15), (12.6, 12.6)),
    ("dropout", "p"): ((0.05, 0.5), (0.2, 0.5)),
    ("coarse_dropout", "p"): ((0.05, 0.2), (0.2, 0.2)),
    ("coarse_dropout", "cells"): ((4, 16), (2, 5)),
    ("multiply", "m"): ((0.25, 2.5), (0.25, 2.5)),
    ("salt_pepper", "p"): ((0, 0.1), (0, 0.1)),
    ("solarize", "t"): ((64, 192), (64, 192)),
    ("jpeg_compression", "quality"): ((7, 60), (7, 17)),
}
PER_CHANNEL = ["contrast_gamma", "contrast_linear", "brightness_channel", "multiply"]


# Of the seed (3, 1); see `test_magnitudes_and_pixels_of_a_seed_are_pinned`.
PINNED_MAGNITUDES = [
    "blur sigma 1.6261",
    "invert_channel channels [1.0, 1.0, 0.0]",
    "invert_channel swap_red_blue 0.0",
    "coarse_dropout p 0.0933",
    "coarse_dropout cells [4.0, 14.0]",
    "salt_pepper p 0.0815",
    "dropout p 0.4671",
]
PINNED_PIXELS = "00267574d568854a"


def picture(height, width, seed=0):
    """Returns smooth colours with noise, and black, white and grey corners."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (4, 4, 0))
    levels = 128 + 70 * smooth / max(smooth.std(), 1e-9) + rng.normal(size=smooth.shape) * 5
    image = levels.clip(0, 255).astype(np.uint8)
    image[: height // 4, : width // 4] = 0
    image[: height // 4, -(width // 4) or width :] = 255
    image[-(height // 4) or height :, : width // 4] = 90
    return image


def flat(level, size=512):
    return np.full((size, size, 3), level, np.uint8)


def apply(name, image, **magnitude):
    return OPS[name].apply(image, **magnitude).numpy()


def rounded(levels):
    return np.floor(np.asarray(levels, np.float64) + 0.5).clip(0, 255).astype(np.uint8)


def distance(image, reference):
    return np.abs(image.astype(int) - reference.astype(int)).max()


def sda_config(ops=tuple(OPS), num_ops=3, replace=True, magnitude="uniform"):
    return types.SimpleNamespace(num_ops=num_ops, replace=replace, magnitude=magnitude, ops=ops)


# --- Kernels against independent implementations -------------------------------------------------


def test_pool_has_the_17_operations_in_order():
    assert list(OPS) == [
        *("contrast_gamma", "contrast_linear", "brightness", "brightness_channel", "equalize"),
        *("hsv", "invert_channel", "blur", "noise_gau", "noise_pos", "channel_shuffle", "dropout"),
        *("coarse_dropout", "multiply", "salt_pepper", "solarize", "jpeg_compression"),
    ]
    assert [operation.name for operation in OPS.values()] == list(OPS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("g", [(0.5, 1.0, 1.5), (0.73, 1.21, 0.5)])
def test_contrast_gamma(size, g):
    image = picture(*size)
    expected = rounded(255 * (image / 255.0) ** np.float32(g).astype(np.float64))
    assert distance(apply("contrast_gamma", image, g=g), expected) == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("a", [(0.5, 1.0, 2.0), (1.37, 0.81, 1.9)])
def test_contrast_linear(size, a):
    image = picture(*size)
    expected = rounded(127 + np.float32(a).astype(np.float64) * (image - 127.0))
    assert distance(apply("contrast_linear", image, a=a), expected) == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("m", [(0.25, 1.0, 2.5), (1.37, 0.81, 1.9)])
def test_multiply(size, m):
    image = picture(*size)
    expected = rounded(np.float32(m).astype(np.float64) * image)
    assert distance(apply("multiply", image, m=m), expected) == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("v", [-20.0, -3.4, 0.0, 12.7, 50.0, 300.0, -300.0])
def test_brightness(size, v):
    image = picture(*size)
    assert distance(apply("brightness", image, v=v), rounded(image + np.float64(v))) == 0


@pytest.mark.parametrize("size", SIZES)
def test_brightness_channel(size):
    image = picture(*size)
    expected = rounded(image + np.array([-20.0, 13.3, 50.0]))
    assert distance(apply("brightness_channel", image, v=(-20.0, 13.3, 50.0)), expected) == 0


@pytest.mark.parametrize("size", [*SIZES, (200, 301)])
def test_equalize_equals_pil(size):
    image = picture(*size)
    expected = np.asarray(ImageOps.equalize(Image.fromarray(image)))
    assert distance(apply("equalize", image), expected) == 0


@pytest.mark.parametrize(
    "levels",
    [
        [[5] * 400, [0] * 400, [255] * 400],  # one level
        [[5] * 10 + [9] * 390, [0] * 254 + [1] * 146, [0] * 255 + [1] * 145],  # step 0, 0, 1
        [[7] * 399 + [200], [0] * 399 + [255], list(range(256)) + [128] * 144],
        [[0] * 300 + [10] * 99 + [200]] * 3,  # exceeds 255 before clipping
    ],
)
def test_equalize_degenerate_histograms(levels):
    image = np.array(levels, np.uint8).T.reshape(20, 20, 3)
    expected = np.asarray(ImageOps.equalize(Image.fromarray(image)))
    assert distance(apply("equalize", image), expected) == 0


def test_equalize_lightness_approximates_opencv():
    image = picture(120, 90)
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.equalizeHist(lab[..., 0])
    expected = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).astype(int)
    difference = np.abs(apply("equalize", image, lightness=True) - expected)
    # OpenCV quantises a and b as well, which changes saturated colours by several levels.
    assert difference.mean() < 1.5
    assert np.abs(expected - image).mean() > 5


def hsv_reference(image, hue, saturation):
    result = np.empty(image.shape)
    for pixel in np.ndindex(image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(image[pixel] / 255.0))
        shifted = (h + hue / 255) % 1, min(max(s + saturation / 255, 0), 1), v
        result[pixel] = 255 * np.array(colorsys.hsv_to_rgb(*shifted))
    return rounded(result)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "shift", [(20, 20), (-20, 20), (20, -20), (-20, -20), (3.3, -12.1), (-7.7, 5), (0, 9), (11, 0)]
)
def test_hsv_equals_colorsys(size, shift):
    image = picture(*size)
    result = apply("hsv", image, hue=shift[0], saturation=shift[1])
    assert distance(result, hsv_reference(image, *shift)) <= 1


def test_hsv_of_nearly_grey_pixels():
    image = np.random.default_rng(0).integers(200, 202, (20, 31, 3)).astype(np.uint8)
    assert distance(apply("hsv", image, hue=20, saturation=20), hsv_reference(image, 20, 20)) <= 1


@pytest.mark.parametrize("hue", [42.5, -42.5, 70, 100, -100, 127.5, 150, 200, -230, 255, 300])
def test_hsv_turns_the_full_circle(hue):
    image = picture(20, 31)
    assert distance(apply("hsv", image, hue=hue, saturation=0), hsv_reference(image, hue, 0)) <= 1


def test_hsv_by_hand():
    image = np.array([[[200, 0, 0], [0, 200, 0], [100, 100, 100], [0, 0, 0]]], np.uint8)
    turned = apply("hsv", image, hue=85, saturation=0)  # 120 degrees: red to green to blue
    np.testing.assert_array_equal(turned, [[[0, 200, 0], [0, 0, 200], [100, 100, 100], [0, 0, 0]]])
    # Grey has hue 0, so saturation reduces its green and blue, by 51 / 255 of 100.
    saturated = apply("hsv", image, hue=0, saturation=51)
    np.testing.assert_array_equal(saturated, [[[200, 0, 0], [0, 200, 0], [100, 80, 80], [0, 0, 0]]])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [(True, False, False), (False, True, True), (True,) * 3])
def test_invert_channel(size, channels):
    image = picture(*size)
    expected = np.where(channels, 255 - image, image)
    np.testing.assert_array_equal(apply("invert_channel", image, channels=channels), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sigma", [0.5, 0.84, 1.0, 1.5, 2.0])
def test_blur_equals_opencv(size, sigma):
    image = picture(*size)
    side = 2 * int(np.ceil(3 * np.float64(np.float32(sigma)))) + 1
    expected = cv2.GaussianBlur(
        image.astype(np.float64), (side, side), sigma, borderType=cv2.BORDER_REPLICATE
    )
    assert distance(apply("blur", image, sigma=sigma), rounded(expected)) <= 1


@pytest.mark.parametrize("sigma", [0.5, 1.3, 2.0])
def test_blur_equals_scipy(sigma):
    image = picture(33, 20)
    radius = int(np.ceil(3 * sigma))
    expected = ndimage.gaussian_filter(
        image.astype(np.float64), sigma, mode="nearest", radius=radius, axes=(0, 1)
    )
    assert distance(apply("blur", image, sigma=sigma), rounded(expected)) <= 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_channel_shuffle(size, order):
    image = picture(*size)
    result = apply("channel_shuffle", image, permutation=order)
    np.testing.assert_array_equal(result, image[..., list(order)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("t", [0, 64, 100, 128, 192, 255, 256])
def test_solarize_equals_pil(size, t):
    image = picture(*size)
    expected = np.asarray(ImageOps.solarize(Image.fromarray(image), t))
    np.testing.assert_array_equal(apply("solarize", image, t=t), expected)


def test_solarize_by_hand():
    image = np.array([[[10, 100, 101], [128, 200, 255]]], np.uint8)
    np.testing.assert_array_equal(
        apply("solarize", image, t=100.5), [[[10, 100, 154], [127, 55, 0]]]
    )


@pytest.mark.parametrize("size", [*SIZES, (120, 131)])
@pytest.mark.parametrize("quality", [7, 17, 60])
def test_jpeg_approximates_pil(size, quality):
    image = picture(*size)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file)).astype(int)
    assert np.abs(apply("jpeg_compression", image, quality=quality) - expected).mean() < 1


# --- Random kernels: mean, variance, support, independence ---------------------------------------


def ks(values, cdf):
    """Returns the Kolmogorov-Smirnov distance of integer values from a distribution."""
    levels, counts = np.unique(values, return_counts=True)
    empirical = np.cumsum(counts) / counts.sum()
    return np.abs(empirical - cdf(levels)).max()


@pytest.mark.parametrize("s", [7.65, 14.2, 20.4])
def test_noise_gau_distribution(s):
    noise = apply("noise_gau", flat(128), s=s, seed=(3, 1)).astype(int) - 128
    count = noise.size
    assert abs(noise.mean()) < 5 * s / np.sqrt(count)
    # Rounding to integers adds 1/12.
    assert noise.var() == pytest.approx(s**2 + 1 / 12, rel=5 * np.sqrt(2 / count))
    assert ks(noise, lambda x: stats.norm.cdf((x + 0.5) / s)) < 2.2 / np.sqrt(count)


@pytest.mark.parametrize("lam", [10.0, 12.6, 15.0])
def test_noise_pos_distribution(lam):
    noise = apply("noise_pos", flat(128), lam=lam, seed=(3, 1)).astype(int) - 128
    count = noise.size
    assert abs(noise.mean()) < 5 * np.sqrt((lam + lam**2) / count)
    assert np.abs(noise).mean() == pytest.approx(lam, abs=5 * np.sqrt(lam / count))
    assert np.abs(noise).var() == pytest.approx(lam, rel=5 * np.sqrt(3 / count))
    assert ks(np.abs(noise), lambda x: stats.poisson.cdf(x, lam)) < 2.2 / np.sqrt(count)


@pytest.mark.parametrize(
    ("name", "magnitude", "beyond", "probability"),
    [
        # 4.5 standard deviations, and a tail of probability 1e-5: below the resolution of 16 bits.
        ("noise_gau", {"s": 20.0}, 90, 2 * stats.norm.sf(89.5 / 20)),
        ("noise_pos", {"lam": 12.0}, 29, stats.poisson.sf(28, 12)),
    ],
)
def test_noise_tails(name, magnitude, beyond, probability):
    images = [
        apply(name, flat(128, 160), seed=(seed, 5), **magnitude).astype(int) for seed in range(160)
    ]
    observed = np.mean([np.abs(image - 128) >= beyond for image in images])
    assert observed == pytest.approx(probability, rel=0.4)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_dropout_distribution(p):
    result = apply("dropout", flat(77), p=p, seed=(3, 1))
    assert set(np.unique(result)) <= {0, 77}
    assert (result == 0).mean() == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / result.size))


@pytest.mark.parametrize("p", [0.0, 0.003, 0.05, 0.1, 1.0])
def test_salt_pepper_distribution(p):
    # Replaced values are equal in both images, all others differ.
    low, high = (apply("salt_pepper", flat(level), p=p, seed=(3, 1)) for level in (100, 101))
    replaced = low == high
    count = replaced.size
    assert replaced.mean() == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / count))
    np.testing.assert_array_equal(low[~replaced], 100)
    if p:
        values = low[replaced]
        cdf = lambda x: stats.beta.cdf((x + 0.5) / 255, 0.5, 0.5)  # noqa: E731
        assert ks(values, cdf) < 2.2 / np.sqrt(len(values))


def test_salt_pepper_reaches_the_last_pixels():
    images = [apply("salt_pepper", flat(128, 32), p=0.1, seed=(seed, 1)) for seed in range(80)]
    ends = np.stack(images)[:, -1, -10:] != 128
    assert ends.mean() == pytest.approx(0.1, abs=5 * np.sqrt(0.09 / ends.size))


def test_coarse_dropout_drops_whole_cells_of_single_channels():
    image = picture(64, 48) // 2 + 1
    result = apply("coarse_dropout", image, p=0.3, cells=(4, 8), seed=(3, 1))
    unchanged = (result == image).reshape(4, 16, 8, 6, 3)
    np.testing.assert_array_equal(unchanged.all(axis=(1, 3)), unchanged.any(axis=(1, 3)))
    np.testing.assert_array_equal(result[result != image], 0)
    cells = unchanged.any(axis=(1, 3))
    assert (cells.any(axis=-1) & ~cells.all(axis=-1)).any()  # channels differ


def test_coarse_dropout_probability():
    unchanged = [
        apply("coarse_dropout", flat(9, 16), p=0.2, cells=(16, 16), seed=(seed, 1)).mean() / 9
        for seed in range(100)
    ]
    assert np.mean(unchanged) == pytest.approx(0.8, abs=5 * np.sqrt(0.16 / (100 * 768)))


@pytest.mark.parametrize("size", SIZES)
def test_coarse_dropout_enlarges_by_nearest(size):
    # With uneven and too fine grids, every pixel has the value of the cell at its centre.
    cells = np.array([5, 16])
    image = np.full((*size, 3), 200, np.uint8)
    grid = apply(
        "coarse_dropout", np.full((*cells, 3), 200, np.uint8), p=0.5, cells=cells, seed=(1, 1)
    )
    rows, columns = (
        np.floor((np.arange(size[axis]) + 0.5) * cells[axis] / size[axis]).astype(int)
        for axis in (0, 1)
    )
    result = apply("coarse_dropout", image, p=0.5, cells=cells, seed=(1, 1))
    np.testing.assert_array_equal(result, grid[rows][:, columns])


MAGNITUDES = {
    "noise_gau": {"s": 12.0},
    "noise_pos": {"lam": 12.0},
    "dropout": {"p": 0.3},
    "coarse_dropout": {"p": 0.2, "cells": (512, 512)},
    "salt_pepper": {"p": 0.1},
}


def correlation(a, b):
    return abs(np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1])


@pytest.mark.parametrize("name", RANDOM)
def test_random_operations_are_independent(name):
    image = flat(128)
    first, second, third = (
        apply(name, image, seed=seed, **MAGNITUDES[name]) for seed in ((7, 0), (7, 1), (8, 0))
    )
    assert correlation(first[:, 1:], first[:, :-1]) < 0.01
    assert correlation(first[1:], first[:-1]) < 0.01
    assert correlation(first[..., 0], first[..., 1]) < 0.01
    assert correlation(first[..., 1], first[..., 2]) < 0.01
    assert correlation(first[..., 0], first[..., 2]) < 0.01
    assert correlation(first, second) < 0.01
    assert correlation(first, third) < 0.01


@pytest.mark.parametrize("name", RANDOM)
def test_random_operations_are_functions_of_their_seed(name):
    image = picture(33, 20)
    results = [apply(name, image, seed=(7, 9), **MAGNITUDES[name]) for _ in range(2)]
    np.testing.assert_array_equal(*results)


# --- Magnitudes ----------------------------------------------------------------------------------


@functools.cache
def draws(name, count=300, magnitude="uniform"):
    """Returns the magnitudes of many seeds, stacked by entry."""
    signature = {k: v.dtype for k, v in OPS[name].sample((0, 0), magnitude=magnitude).items()}

    @tf.function
    def sample_all(seeds):
        sample = functools.partial(OPS[name].sample, magnitude=magnitude)
        return tf.map_fn(sample, seeds, fn_output_signature=signature)

    sampled = sample_all(tf.stack([tf.range(count), tf.fill([count], 5)], axis=1))
    return {key: value.numpy() for key, value in sampled.items()}


@pytest.mark.parametrize(("name", "key"), RANGES)
@pytest.mark.parametrize("magnitude", ["uniform", "released"])
def test_sample_covers_its_range(name, key, magnitude):
    low, high = RANGES[name, key][magnitude == "released"]
    values = draws(name, magnitude=magnitude)[key]
    assert values.min() >= np.float32(low)
    assert values.max() <= np.float32(high)
    span = high - low
    assert values.min() <= low + 0.05 * span
    assert values.max() >= high - 0.05 * span
    middle = 5 * (span + 1e-3) / np.sqrt(12 * len(values))
    assert values.mean() == pytest.approx((low + high) / 2, abs=middle)


@pytest.mark.parametrize(("name", "key"), RANGES)
@pytest.mark.parametrize("magnitude", ["uniform", "released"])
def test_at_interpolates_the_range(name, key, magnitude):
    low, high = RANGES[name, key][magnitude == "released"]
    for fraction in (0, 0.5, 1):
        value = OPS[name].at_fraction(fraction, (0, 0), magnitude)[key].numpy()
        rounding = 0.5 if value.dtype.kind == "i" else 1e-5
        np.testing.assert_allclose(value, low + fraction * (high - low), atol=rounding)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("magnitude", ["uniform", "released"])
def test_at_returns_same_entries_as_sample(name, magnitude):
    interpolated = OPS[name].at_fraction(0.5, (1, 2), magnitude)
    sampled = OPS[name].sample((1, 2), magnitude)
    assert {k: (v.shape, v.dtype) for k, v in interpolated.items()} == {
        k: (v.shape, v.dtype) for k, v in sampled.items()
    }


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_channels_are_drawn_independently(name):
    (values,) = draws(name).values()
    assert values.shape == (300, 3)
    assert np.abs(np.corrcoef(values.T) - np.eye(3)).max() < 0.25


def test_brightness_draws_one_shift_for_all_channels():
    assert OPS["brightness"].sample((1, 2))["v"].shape == ()


def test_hue_and_saturation_are_drawn_independently():
    values = draws("hsv")
    assert abs(np.corrcoef(values["hue"], values["saturation"])[0, 1]) < 0.25


def test_coarse_grid_sides_are_drawn_independently():
    cells = draws("coarse_dropout")["cells"]
    assert abs(np.corrcoef(cells.T)[0, 1]) < 0.25
    assert set(cells.ravel()) == set(range(4, 17))


def test_invert_channel_selects_at_least_one_channel():
    selected = draws("invert_channel", 800)["channels"]
    assert selected.any(axis=1).all()
    # The probability of each single channel is 1/8 plus a third of the 1/8 for no channel; that
    # of each other combination is 1/8.
    singles = (selected.sum(axis=1) == 1).mean()
    assert singles == pytest.approx(4 / 8, abs=5 * np.sqrt(0.25 / 800))
    assert selected.mean(axis=0) == pytest.approx(13 / 24, abs=5 * np.sqrt(0.25 / 800))


def test_channel_shuffle_draws_all_permutations():
    orders, counts = np.unique(draws("channel_shuffle")["permutation"], axis=0, return_counts=True)
    assert len(orders) == 6
    assert counts.min() > 300 / 6 - 5 * np.sqrt(300 / 6)


def test_released_hsv_is_identity():
    image = picture(50, 41)
    result = apply("hsv", image, **OPS["hsv"].sample((1, 2), magnitude="released"))
    np.testing.assert_array_equal(result, image)


def test_released_invert_swaps_red_and_blue():
    image = picture(50, 41)
    magnitude = OPS["invert_channel"].sample((1, 2), magnitude="released")
    np.testing.assert_array_equal(apply("invert_channel", image, **magnitude), image[..., ::-1])


def test_released_equalize_uses_lightness():
    magnitude = OPS["equalize"].sample((1, 2), magnitude="released")
    image = picture(50, 41)
    np.testing.assert_array_equal(
        apply("equalize", image, **magnitude), apply("equalize", image, lightness=True)
    )


def test_unknown_magnitude_raises():
    with pytest.raises(ValueError, match="uniform, released"):
        OPS["blur"].sample((0, 0), magnitude="paper")


# --- Every operation, eagerly, in graphs, at any size --------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_eager_equals_graph(name):
    seed = tf.constant([11, 12])
    augment = lambda image, seed: OPS[name].apply(image, **OPS[name].sample(seed))  # noqa: E731
    signature = [tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([2], tf.int32)]
    graph = tf.function(augment, input_signature=signature)
    for size in ((1, 1), (1, 7), (33, 20)):
        image = tf.constant(picture(*size))
        eager = augment(image, seed)
        assert eager.dtype == tf.uint8
        assert eager.shape == image.shape
        np.testing.assert_array_equal(eager, graph(image, seed))


@pytest.mark.parametrize("name", OPS)
def test_static_shape_is_preserved(name):
    graph = tf.function(lambda image: OPS[name].apply(image, **OPS[name].sample((1, 2))))
    concrete = graph.get_concrete_function(tf.TensorSpec([9, 11, 3], tf.uint8))
    assert concrete.output_shapes == (9, 11, 3)


def test_inputs_stay_as_they_are():
    image = picture(33, 20)
    before = image.copy()
    for operation in OPS.values():
        operation.apply(image, **operation.sample((1, 2)))
    for seed in range(20):
        strong_augment(image, (seed, 2), sda_config())
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("bands", [1, 4, 16])
def test_kernels_take_any_number_of_bands(bands):
    """All but those on colours. The first bands are those of the image without the others."""
    image = np.tile(picture(40, 30), (1, 1, 6))[..., :bands].copy()
    magnitudes = MAGNITUDES | {"blur": {"sigma": 1.5}, "equalize": {}}
    for name, magnitude in magnitudes.items():
        operation = OPS[name]
        seed = {"seed": (1, 2)} if name in RANDOM else {}
        arguments = operation.arguments(magnitude | seed)
        result = operation.kernel(image, **arguments)
        assert (result.shape, result.dtype) == (image.shape, image.dtype)
        assert (result != image).any(axis=(0, 1)).all()
        if name not in RANDOM:
            first = operation.kernel(image[..., :1].copy(), **arguments)
            np.testing.assert_array_equal(result[..., :1], first)


def test_other_image_dtypes_raise():
    with pytest.raises(ValueError, match="uint8"):
        OPS["solarize"].apply(np.zeros((2, 2, 3), np.float32), t=100)


# --- The draw of operations ----------------------------------------------------------------------


def test_num_ops_0_returns_the_image():
    image = picture(9, 8)
    np.testing.assert_array_equal(strong_augment(image, (1, 2), sda_config(num_ops=0)), image)


def test_whole_config_and_sda_config_are_equivalent():
    image, sda = picture(9, 8), sda_config()
    config = types.SimpleNamespace(sda=sda)
    np.testing.assert_array_equal(
        strong_augment(image, (1, 2), sda), strong_augment(image, (1, 2), config)
    )


def test_too_many_operations_without_replacement_raise():
    config = sda_config(ops=("blur", "equalize"), num_ops=3, replace=False)
    with pytest.raises(ValueError, match=r"num_ops is 3 without replacement from 2 operations"):
        strong_augment(picture(9, 8), (1, 2), config)


def test_unknown_operation_raises():
    with pytest.raises(ValueError, match=r"no operation of the pool: emboss; there are contrast_g"):
        strong_augment(picture(9, 8), (1, 2), sda_config(ops=("emboss",)))


def recorded_orders(monkeypatch, config, seeds):
    """Returns the operations that `strong_augment` applies for each seed, in order."""
    orders = []
    for name, operation in list(OPS.items()):
        record = lambda image, name=name, **_: (orders[-1].append(name), image)[1]  # noqa: E731
        changed = dataclasses.replace(operation, kernel=record, table=None)
        monkeypatch.setitem(OPS, name, changed)
    for seed in range(seeds):
        orders.append([])
        strong_augment(tf.zeros([2, 2, 3], tf.uint8), (seed, 1), config)
    return orders


def test_draws_with_replacement_cover_all_sequences(monkeypatch):
    ops = ("blur", "equalize", "solarize")
    orders = recorded_orders(monkeypatch, sda_config(ops=ops, num_ops=2), 108)
    sequences, counts = np.unique([" ".join(order) for order in orders], return_counts=True)
    assert len(sequences) == 9
    assert counts.max() < 12 + 4 * np.sqrt(12)


def test_draws_without_replacement_are_distinct_and_ordered(monkeypatch):
    ops = ("solarize", "blur", "equalize", "hsv")
    config = sda_config(ops=ops, num_ops=2, replace=False)
    orders = recorded_orders(monkeypatch, config, 120)
    pairs, counts = np.unique([" ".join(order) for order in orders], return_counts=True)
    expected = {f"{a} {b}" for i, a in enumerate(ops) for b in ops[i + 1 :]}
    assert set(pairs) == expected
    assert counts.min() > 20 - 4 * np.sqrt(20)


def test_drawing_all_without_replacement(monkeypatch):
    config = sda_config(num_ops=17, replace=False)
    assert recorded_orders(monkeypatch, config, 2) == [list(OPS)] * 2


def test_positions_have_independent_magnitudes():
    # With equal seeds, a second dropout would drop no further pixels.
    once, twice = (
        strong_augment(flat(9, 64), (1, 2), sda_config(ops=("dropout",), num_ops=n)) for n in (1, 2)
    )
    assert (twice.numpy() > 0).mean() < 0.97 * (once.numpy() > 0).mean()


@pytest.mark.parametrize(("replace", "magnitude"), [(True, "uniform"), (False, "released")])
def test_strong_augment_in_tf_data_equals_eager(replace, magnitude):
    config = sda_config(replace=replace, magnitude=magnitude)
    sizes = [(33, 20), (1, 1), (1, 7), (50, 41)]
    images = [picture(*sizes[i % 4], seed=i) for i in range(12)]
    data = tf.data.Dataset.from_generator(
        lambda: enumerate(images),
        output_signature=(tf.TensorSpec([], tf.int64), tf.TensorSpec([None, None, 3], tf.uint8)),
    )
    data = data.map(
        lambda i, image: strong_augment(image, tf.stack([i, 3]), config), num_parallel_calls=2
    )
    changed = 0
    for i, (image, result) in enumerate(zip(images, data.as_numpy_iterator(), strict=True)):
        np.testing.assert_array_equal(result, strong_augment(image, (i, 3), config))
        changed += not np.array_equal(result, image)
    assert changed >= 9


def test_operations_in_a_row_equal_single_ones():
    """Point operations in a row are one look-up; the levels are those of one look-up for each."""
    image = picture(33, 20)
    points = ("contrast_gamma", "brightness", "invert_channel", "multiply", "solarize")
    config = sda_config(ops=(*points, "blur"), num_ops=4)
    longest = 0
    for seed in range(30):
        expected = image
        drawn = sample_ops((seed, 1), config)
        for name, magnitude in drawn:
            expected = OPS[name].apply(expected, **magnitude).numpy()
        np.testing.assert_array_equal(strong_augment(image, (seed, 1), config), expected)
        longest = max(longest, " ".join(name for name, _ in drawn).split("blur")[0].count(" "))
    assert longest >= 2


def test_magnitudes_and_pixels_of_a_seed_are_pinned():
    """A seed keeps its operations and magnitudes, so that a run resumes with a later version.

    If a change is intended, take the new values from this test's output.
    """
    drawn = sample_ops((3, 1), sda_config(num_ops=5))
    values = [
        f"{name} {key} {np.round(value.numpy().astype(float), 4).tolist()}"
        for name, magnitude in drawn
        for key, value in magnitude.items()
        if key != "seed"
    ]
    assert values == PINNED_MAGNITUDES
    config = sda_config(ops=("noise_gau", "noise_pos", "coarse_dropout"), replace=False)
    pixels = strong_augment(flat(77, 40), (3, 1), config).numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == PINNED_PIXELS


def test_result_depends_on_seed():
    image, config = picture(33, 20), sda_config()
    results = [strong_augment(image, (seed, 0), config).numpy() for seed in (4, 4, 5)]
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).any()
