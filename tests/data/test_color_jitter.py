"""Colour jitter, greyscale and blur against PIL and torchvision, and the laws of their draws."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance
from scipy import ndimage, stats

from configs import default
from semiseg_jax import config_check
from semiseg_jax.data import color_jitter
from tests.errors import raises_code

# Made by torchvision 0.29.1 on uint8 tensors [3, h, w]:
#   rng = np.random.default_rng(0)
#   image = rng.integers(0, 256, (20, 22, 3)).astype(np.uint8)
#   image[:, 11:] = 10 * np.arange(20)[:, None, None] + rng.integers(0, 9, (20, 11, 3))
#   hue[i] = adjust_hue(image, HUES[i])
#   blur[i] = gaussian_blur(image, 2 * math.ceil(3 * SIGMAS[i]) + 1, SIGMAS[i])
TORCHVISION = np.load(Path(__file__).parent / "color_jitter_torchvision.npz")
HUES = (-0.25, 0.05, 0.5)
SIGMAS = (0.5, 1.5)
IMAGE = TORCHVISION["image"]
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}

# The published operations: keys of method.views that differ from the defaults, UniMatch's.
RECIPES = {
    "unimatch": {},
    "cutmix": {"jitter": (0.4, 0.4, 0.4, 0.1), "blur_probability": 0.0},
    "classmix": {
        "jitter": (0.25,) * 4,
        "grey_probability": 0.0,
        "blur_sigma": (0.15, 1.15),
        "per_batch": True,
    },
    "pseudoseg": {"jitter_probability": 1.0, "grey_probability": 0.0, "blur_probability": 0.0},
    "self_training": {"kind": "sda"},
}


def views_config(**changes):
    config = default.get_config()
    config.method.views.update(changes)
    return config.method.views


def augment(config, *seed):
    return color_jitter.color_augment(tf.constant(IMAGE), tf.constant(seed), config).numpy()


def apply(operation, image, factor):
    """Returns the levels after an operation, as integers with a sign."""
    return operation(tf.constant(image), tf.constant(factor, tf.float32)).numpy().astype(int)


@pytest.mark.parametrize("name", ENHANCERS)
def test_operations_equal_those_of_pil(name):
    """As torchvision calls them for PIL images, with factors below and above 1."""
    for factor in (0.0, 0.3, 0.77, 1.0, 1.13, 1.9):
        expected = ENHANCERS[name](Image.fromarray(IMAGE)).enhance(factor)
        actual = apply(getattr(color_jitter, name), IMAGE, factor)
        np.testing.assert_array_equal(actual, np.asarray(expected), err_msg=f"{factor}")


def test_greyscale_equals_that_of_pil():
    grey = color_jitter.greyscale(tf.constant(IMAGE)).numpy()
    expected = np.asarray(Image.fromarray(IMAGE).convert("L"))
    np.testing.assert_array_equal(grey, np.repeat(expected[..., None], 3, -1))


def test_hue_agrees_with_torchvision_to_one_level():
    for shift, expected in zip(HUES, TORCHVISION["hue"], strict=True):
        assert np.abs(apply(color_jitter.hue, IMAGE, shift) - expected).max() <= 1
        assert np.abs(expected.astype(int) - IMAGE).max() > 50
    np.testing.assert_array_equal(apply(color_jitter.hue, IMAGE, 0.0), IMAGE)


def certain(**changes):
    """Config of views without any operation but the given ones."""
    none = {"jitter_probability": 0.0, "grey_probability": 0.0, "blur_probability": 0.0}
    return views_config(**none | changes)


def test_blur_agrees_with_torchvision_inside_the_borders():
    for sigma, expected in zip(SIGMAS, TORCHVISION["blur"], strict=True):
        config = certain(blur_probability=1.0, blur_sigma=(sigma, sigma))
        blurred = augment(config, 1, 2)
        difference = np.abs(blurred.astype(int) - expected)[5:-5, 5:-5]
        assert difference.size and difference.max() <= 1
        # At the borders, torchvision mirrors the image, PIL and this project repeat its edge.
        exact = ndimage.gaussian_filter(
            IMAGE.astype(float), (sigma, sigma, 0), mode="nearest", radius=(5, 5, 0)
        )
        assert np.abs(blurred - exact).max() <= 1


def test_operations_are_applied_in_the_drawn_order():
    """The whole augmentation is PIL's operations with the drawn factors, in the drawn order."""
    config = certain(jitter=(0.5, 0.4, 0.3, 0.0), jitter_probability=1.0, grey_probability=0.5)
    outcomes = set()
    for seed in range(12):
        drawn = color_jitter.draw(tf.constant([seed, 7]), config)
        expected = Image.fromarray(IMAGE)
        for kind in drawn.order.numpy():
            if kind < 3:
                enhance = list(ENHANCERS.values())[kind]
                expected = enhance(expected).enhance(float(drawn.factors[kind]))
        if drawn.is_grey:
            expected = expected.convert("L").convert("RGB")
        actual = augment(config, seed, 7)
        np.testing.assert_array_equal(actual, np.asarray(expected))
        outcomes.add((tuple(drawn.order.numpy()), bool(drawn.is_grey)))
    assert len(outcomes) > 6


def test_hue_is_part_of_the_jitter():
    config = certain(jitter=(0.0, 0.0, 0.0, 0.25), jitter_probability=1.0)
    shift = color_jitter.draw(tf.constant([1, 2]), config).factors[3]
    actual = augment(config, 1, 2)
    np.testing.assert_array_equal(actual, apply(color_jitter.hue, IMAGE, shift))
    assert abs(float(shift)) > 0.01


def draws(config, count):
    """Returns the fields of `count` draws as arrays [count, ...] by name."""
    seeds = tf.data.Dataset.range(count).map(
        tf.autograph.experimental.do_not_convert(
            lambda i: vars(color_jitter.draw(tf.stack([i, 5]), config))
        )
    )
    (arrays,) = seeds.batch(count).as_numpy_iterator()
    return arrays


def test_draws_follow_their_laws():
    """Uniform factors, shifts, sigmas and orders; probabilities; all independent."""
    config = views_config(jitter=(0.5, 0.25, 1.5, 0.1), blur_sigma=(0.15, 1.15))
    arrays = draws(config, 4000)
    factors = arrays["factors"]
    ranges = [(0.5, 1.5), (0.75, 1.25), (0, 2.5), (-0.1, 0.1), (0.15, 1.15)]
    values = np.column_stack([factors, arrays["sigma"]])
    for column, (low, high) in zip(values.T, ranges, strict=True):
        assert stats.kstest(column, "uniform", (low, high - low)).pvalue > 1e-3
    for name, probability in (("is_jittered", 0.8), ("is_grey", 0.2), ("is_blurred", 0.5)):
        assert stats.binomtest(int(arrays[name].sum()), 4000, probability).pvalue > 1e-3
    orders = [arrays["order"].tolist().count(list(o)) for o in itertools.permutations(range(4))]
    assert sum(orders) == 4000 and stats.chisquare(orders).pvalue > 1e-3
    coins = np.column_stack([arrays[name] for name in ("is_jittered", "is_grey", "is_blurred")])
    everything = np.column_stack([values, coins, arrays["order"][:, 0]]).astype(float)
    correlation = np.corrcoef(everything.T) - np.eye(everything.shape[1])
    assert np.abs(correlation).max() < 0.07


def test_probabilities_of_0_and_1_are_certain():
    for probability in (0.0, 1.0):
        names = ("jitter_probability", "grey_probability", "blur_probability")
        arrays = draws(views_config(**dict.fromkeys(names, probability)), 300)
        for name in ("is_jittered", "is_grey", "is_blurred"):
            assert (arrays[name] == bool(probability)).all()


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes_are_accepted(name):
    config = default.get_config()
    config.method.views.update(RECIPES[name])
    config_check.check(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "jiter"),
        ("jitter", (0.5, 0.5, 0.5)),
        ("jitter", (0.5, 0.5, 0.5, 0.6)),
        ("jitter", (-0.5, 0.5, 0.5, 0.1)),
        ("jitter_probability", 1.5),
        ("grey_probability", -0.1),
        ("blur_probability", 2.0),
        ("blur_sigma", (2.0, 0.1)),
        ("blur_sigma", (0.0, 2.0)),
    ],
)
def test_impossible_operations_are_refused_by_key(key, value):
    config = default.get_config()
    config.method.views[key] = value
    with raises_code("config-value-invalid", f"method.views.{key}"):
        config_check.check(config)


def test_pixels_do_not_depend_on_the_graph():
    """Eager execution and a graph give the same pixels."""
    config = views_config(blur_probability=1.0, jitter_probability=1.0)
    in_graph = tf.function(
        lambda image, seed: color_jitter.color_augment(image, seed, config), autograph=False
    )
    for seed in range(4):
        pixels = in_graph(tf.constant(IMAGE), tf.constant([seed, 1]))
        np.testing.assert_array_equal(pixels, augment(config, seed, 1))
