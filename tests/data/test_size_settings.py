"""Crop, scale, downscaling and dilation rates that are chosen from the sizes of the images."""

import math
import random

import numpy as np
import pytest
from PIL import Image

from configs import default
from semiseg_jax import config_check
from semiseg_jax.data import size_settings
from semiseg_jax.data.sources.downscale import shrunk
from semiseg_jax.models import deeplab
from semiseg_jax.runtime.logger import capture_lines

KEYS = ("data.crop", "data.scale", "data.downscale", "model.aspp_rates")


def open_config(**changes):
    """The default config with every setting open; changes by dotted key, __ for the dot."""
    config = default.get_config()
    config.data.crop, config.data.scale, config.data.downscale = (), (), 0
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def choose(sizes, **changes):
    """The values chosen for sizes: (crop, scale, factor, rates)."""
    values = size_settings.choose_from_sizes(open_config(**changes), sizes)
    assert values.keys() == set(KEYS)
    return tuple(values[key] for key in KEYS)


def generated_mixes():
    """Mixes of sizes: one size, two orientations, many sizes, all extreme shapes, outliers."""
    rng = random.Random(0)
    mixes = [[(360, 480)] * 9, [(64, 64)] * 3, [(300, 4000)] * 5, [(3000, 4000)] * 4, [(7, 9)] * 2]
    mixes += [[(360, 480)] * a + [(480, 360)] * b for a, b in ((5, 5), (9, 1), (2, 6), (1, 1))]
    mixes += [[(360, 480)] * 20 + [outlier] for outlier in ((9000, 9000), (8, 8), (16, 9000))]
    for _ in range(60):
        low, high = sorted(rng.uniform(2, 12) for _ in range(2))
        count = rng.randint(1, 30)
        mixes.append(
            [
                (round(2 ** rng.uniform(low, high)), round(2 ** rng.uniform(low, high)))
                for _ in range(count)
            ]
        )
    return mixes


MIXES = generated_mixes()


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_crops_have_sides_that_the_features_fit_and_a_bounded_area(stride):
    for sizes in MIXES:
        (height, width), (low, high), factor, _ = choose(sizes, model__output_stride=stride)
        assert height % stride == width % stride == 1
        assert min(height, width) > stride
        # A side may be longer only where the other is as short as possible.
        assert height * width <= 257 * 257
        assert 0.5 <= low <= 1 <= high <= 2
        assert 1 <= factor <= 64


@pytest.mark.parametrize(("backbone", "patch"), [("dinov2_vits14", 14), ("dinov3_vits16", 16)])
def test_crops_for_a_vision_transformer_are_whole_patches_and_have_no_rates(backbone, patch):
    for sizes in MIXES:
        config = open_config(model__backbone=backbone, model__head="dpt")
        values = size_settings.choose_from_sizes(config, sizes)
        assert values.keys() == {"data.crop", "data.scale", "data.downscale"}
        height, width = values["data.crop"]
        assert height % patch == width % patch == 0 < min(height, width)
        assert height * width <= 257 * 257
        config_check.check(size_settings.with_values(config, values))


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_three_of_four_images_reach_each_side_of_the_crop_at_every_scale(stride):
    for sizes in MIXES:
        crop, (low, _), factor, _ = choose(sizes, model__output_stride=stride)
        for axis in (0, 1):
            sides = [round(low * shrunk(size, factor)[axis]) for size in sizes]
            reached = sum(side >= crop[axis] for side in sides)
            assert reached >= 0.75 * len(sizes) or crop[axis] == stride + 1, (sizes, crop)


def test_the_choice_depends_on_the_set_of_sizes_alone():
    for sizes in MIXES:
        shuffled = random.Random(1).sample(sizes, len(sizes))
        assert choose(shuffled) == choose(sizes) == choose(sizes * 3)


def test_portrait_and_landscape_are_treated_alike():
    for sizes in MIXES:
        crop, *others = choose(sizes)
        turned, *others_turned = choose([size[::-1] for size in sizes])
        assert turned == crop[::-1] and others_turned == others, sizes


def test_one_image_of_another_size_changes_nothing():
    expected = choose([(360, 480)] * 20)
    for outlier in ((9000, 9000), (8, 8), (16, 9000)):
        assert choose([(360, 480)] * 20 + [outlier]) == expected


@pytest.mark.parametrize(
    ("sizes", "crop", "scale", "factor"),
    [
        # CamVid at half size, for which configs/camvid.py has a crop of 128x160.
        ([(180, 240)] * 367, (129, 161), (0.75, 1.5), 1),
        ([(360, 480)] * 120, (225, 289), (0.65, 1.5), 1),
        ([(360, 480)] * 60 + [(480, 360)] * 60, (257, 257), (0.75, 1.5), 1),
        # Photographs of 12 megapixels.
        ([(3000, 4000)] * 50, (225, 289), (0.5, 1.5), 5),
        ([(64, 64)] * 50, (49, 49), (0.8, 1.5), 1),
        ([(300, 4000)] * 50, (97, 625), (0.65, 1.5), 2),
    ],
)
def test_usual_sizes(sizes, crop, scale, factor):
    assert choose(sizes)[:3] == (crop, scale, factor)


def test_the_dilation_rates_fit_the_crop():
    for sizes in MIXES:
        for head in ("v3plus", "v3plus_smp", "v2"):
            config = open_config(model__head=head)
            values = size_settings.choose_from_sizes(config, sizes)
            config = size_settings.with_values(config, values)
            rates = config.model.aspp_rates
            usual = deeplab.default_rates(head, 16)
            assert len(rates) == len(usual) and all(map(int.__le__, rates, usual))
            assert not deeplab.dead_aspp_rates(config.model, config.data.crop), (rates, sizes)


def test_given_settings_stay_as_they_are():
    given = {"data.crop": (65, 97), "data.scale": (0.9, 1.1), "data.downscale": 2}
    for key, value in given.items():
        config = open_config(**{key.replace(".", "__"): value})
        values = size_settings.choose_from_sizes(config, [(360, 480)] * 4)
        assert values.keys() == set(KEYS) - {key}
    config = open_config(**{key.replace(".", "__"): value for key, value in given.items()})
    assert not size_settings.is_open(config)
    assert size_settings.choose_from_sizes(config, [(360, 480)]) == {}
    rates = size_settings.choose_from_sizes(open_config(model__aspp_rates=(4,)), [(360, 480)])
    assert rates.keys() == set(KEYS) - {"model.aspp_rates"}


def test_a_given_crop_determines_the_scales_and_rates():
    _, scale = (
        size_settings.choose_from_sizes(open_config(data__crop=crop), [(360, 480)])["data.scale"]
        for crop in ((193, 193), (513, 513))
    )
    assert scale == (1.0, 1.5)
    values = size_settings.choose_from_sizes(open_config(data__crop=(129, 129)), [(360, 480)])
    assert values["data.scale"] == (0.5, 1.5) and values["model.aspp_rates"] == (2, 3, 5)


def test_a_given_scale_below_1_limits_the_crop():
    height, width = choose_crop_at(0.5)
    assert height <= 0.5 * 180 and width <= 0.5 * 240


def choose_crop_at(lowest):
    config = open_config(data__scale=(lowest, 2.0))
    return size_settings.choose_from_sizes(config, [(180, 240)])["data.crop"]


def test_the_sentence_says_what_was_chosen_from_which_images():
    sizes = [(360, 480)] * 3 + [(480, 360)]
    values = size_settings.choose_from_sizes(open_config(), sizes)
    sentence = size_settings.describe(values, sizes)
    assert "4 images of 480x360 to 360x480, most often 480x360" in sentence
    crop, (low, high) = values["data.crop"], values["data.scale"]
    assert f"crops of {crop[1]}x{crop[0]}; scales of {low:g} to {high:g}" in sentence


def test_one_image_is_no_images():
    values = size_settings.choose_from_sizes(open_config(), [(360, 480)])
    assert size_settings.describe(values, [(360, 480)]).startswith("Chosen from 1 image of 480x360")


def test_images_with_an_unreadable_header_have_no_say(folder_config):
    folder_config.data.crop = ()
    expected = size_settings.choose(folder_config)
    root = folder_config.data.root
    for number in (5, 6):
        with open(f"{root}/images/train/{number:03d}.png", "wb") as file:
            file.write(b"no image")
    assert size_settings.choose(folder_config).values == expected.values
    assert expected.values["data.crop"] == (17, 17)


def test_labelled_and_unlabelled_images_count_alike(folder_config):
    folder_config.data.crop = ()
    Image.fromarray(np.zeros((480, 640, 3), np.uint8)).save(
        f"{folder_config.data.root}/images/train/large.png"
    )
    with capture_lines() as lines:
        size_settings.choose(folder_config)
    assert "13 images of 48x36 to 640x480" in lines[0] or "13 images of 36x48" in lines[0]


@pytest.mark.parametrize(
    ("large", "changes", "factor"),
    [
        ((6000, 4000), {}, 7),
        ((1200, 900), {}, None),
        ((6000, 4000), {"data.downscale": 1}, None),
        ((6000, 4000), {"eval.window": (65, 65), "pseudo.window": (65, 65)}, None),
    ],
)
def test_an_image_far_larger_than_most_is_named(folder_config, large, changes, factor):
    path = f"{folder_config.data.root}/images/train/large.png"
    Image.new("L", large).save(path)
    folder_config.data.update({"crop": (), "downscale": 0})
    folder_config.update_from_flattened_dict(changes)
    with capture_lines() as lines:
        values = size_settings.choose(folder_config).values
    assert values.get("data.downscale", 1) == 1
    warnings = [line for line in lines if line.startswith("Warning: an image of 6000x4000")]
    assert len(warnings) == (factor is not None)
    assert not warnings or f"data.downscale={factor}," in warnings[0]


def test_nothing_is_read_where_nothing_is_open(folder_config):
    folder_config.data.root = "/nowhere"
    assert size_settings.choose(folder_config).values == {}


def test_crops_of_a_chosen_size_hold_no_padding(folder_config):
    """Drawn by the pipeline itself: all of an image's scaled sides reach the crop."""
    from semiseg_jax.data import weak_augment
    from semiseg_jax.runtime.quiet_tensorflow import tf

    config = size_settings.with_values(
        open_config(), size_settings.choose_from_sizes(open_config(), [(180, 240)])
    )
    for seed in range(50):
        geometry = weak_augment.draw(tf.constant((180, 240)), tf.constant((seed, 0)), config.data)
        assert tuple(geometry.valid.numpy()) == config.data.crop
    assert math.isclose(config.data.scale[1], 1.5)
