import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax.losses import IGNORE
from semiseg_jax.methods import masks, mixing
from semiseg_jax.methods.image_keys import image_keys
from tests.errors import raises_code
from tests.methods import arrays
from tests.methods.published import fixture, sample

KEY = jax.random.key(1)


# ---- boxes


def test_half_area_boxes_are_those_of_the_published_code():
    @jax.jit
    def boxes(draws):
        return [
            mixing.half_area_boxes_at(*case) for case in zip(draws, arrays.BOX_SIZES, strict=True)
        ]

    with jax.enable_x64(True):
        drawn = boxes([arrays.box_draws(index) for index in range(len(arrays.BOX_SIZES))])
    for size, ours in zip(arrays.BOX_SIZES, drawn, strict=True):
        published = fixture("french2019")["boxes"]["x".join(map(str, size))]
        np.testing.assert_array_equal(ours, published)


@functools.cache
def draw_boxes(law, images, size, **kwargs):
    """(top, left, height, width) of many boxes."""
    draw = jax.jit(lambda key: getattr(mixing, law)(image_keys(key, images), size, **kwargs))
    boxes = np.asarray(draw(KEY))
    return boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]


def test_half_area_boxes_have_half_the_area_and_lie_inside():
    top, left, height, width = draw_boxes("half_area_boxes", 4000, (129, 257))
    assert top.min() == left.min() == 0
    assert np.max(top + height) == 129 and np.max(left + width) == 257
    # Both sides are rounded to whole pixels.
    rounding = (height + width) / 2 + 1
    assert np.all(np.abs(height * width - 129 * 257 / 2) <= rounding)
    assert height.min() <= 66 and height.max() >= 127 and width.min() <= 131
    # The logarithm of the height's share is uniform.
    shares = np.log(height / 129) / np.log(0.5)
    np.testing.assert_allclose(np.quantile(shares, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)


def rejection_loop(count, size, area=(0.02, 0.4), aspect=(0.3, 1 / 0.3)):
    """UniMatch's law, drawn until it fits: (top, left, height, width) of boxes."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(*area, count) * size[0] * size[1]
    boxes, open_ = np.zeros((count, 4), int), np.arange(count)
    while open_.size:
        ratio = rng.uniform(*aspect, open_.size)
        height = np.sqrt(pixels[open_] * ratio).astype(int)
        width = np.sqrt(pixels[open_] / ratio).astype(int)
        top, left = (rng.integers(0, side, open_.size) for side in size)
        fits = (top + height <= size[0]) & (left + width <= size[1])
        boxes[open_[fits]] = np.stack([top, left, height, width], axis=1)[fits]
        open_ = open_[~fits]
    return boxes.T


def distance(a, b):
    """The largest difference of two empirical distribution functions (Kolmogorov, Smirnov)."""
    a, b = np.sort(a), np.sort(b)
    grid = np.concatenate([a, b])
    return np.max(
        np.abs(
            np.searchsorted(a, grid, "right") / len(a) - np.searchsorted(b, grid, "right") / len(b)
        )
    )


def test_unimatch_boxes_have_the_law_of_the_rejection_loop():
    size = (129, 257)
    ours = draw_boxes("unimatch_boxes", 20_000, size, probability=1.0)
    expected = rejection_loop(20_000, size)
    for name, a, b in zip(("top", "left", "height", "width"), ours, expected, strict=True):
        assert distance(a, b) < 0.02, name
    (_, _, h, w), (_, _, height, width) = ours, expected
    assert distance(h * w, height * width) < 0.02
    assert distance(h / w, height / width) < 0.02
    # Corner and extent together: how much room is left beside a box.
    assert distance(size[0] - ours[0] - h, size[0] - expected[0] - height) < 0.02
    assert np.all(ours[0] + h <= size[0]) and np.all(ours[1] + w <= size[1])


def test_unimatch_boxes_have_the_quantiles_of_the_published_code():
    published = fixture("unimatch")["boxes"]
    side = arrays.UNIMATCH_SIZE
    top, left, height, width = draw_boxes("unimatch_boxes", 20_000, (side, side))
    mixed = height > 0
    assert abs(mixed.mean() - published["share"]) < 0.015
    values = {"top": top, "left": left, "height": height, "width": width}
    values |= {"area": height * width, "ratio": height / np.maximum(width, 1)}
    for name, quantiles in published["quantiles"].items():
        ours = np.quantile(values[name][mixed], arrays.QUANTILES)
        spread = quantiles[-1] - quantiles[0]
        np.testing.assert_allclose(ours, quantiles, atol=0.03 * spread, err_msg=name)


def test_a_crop_in_which_no_box_fits_is_refused():
    keys = image_keys(KEY, 2)
    with raises_code("cutmix-box-does-not-fit", "40%", "100x1000", "data.crop"):
        mixing.unimatch_boxes(keys, (100, 1000))
    with raises_code("cutmix-box-does-not-fit", "1000x100"):
        mixing.unimatch_boxes(keys, (1000, 100))
    top, _, height, _ = draw_boxes("unimatch_boxes", 500, (100, 700), probability=1.0)
    assert height.min() > 0 and np.max(top + height) <= 100


def test_masks_by_law_are_those_of_its_boxes():
    keys = image_keys(KEY, 4)
    for law, boxes in (
        ("unimatch", mixing.unimatch_boxes(keys, (20, 30), probability=1.0)),
        ("half_area", mixing.half_area_boxes(keys, (20, 30), area=0.3)),
    ):
        knobs = {"unimatch": {"probability": 1.0}, "half_area": {"area": 0.3}}[law]
        drawn = mixing.cutmix_boxes(KEY, 4, 20, 30, law, **knobs)
        np.testing.assert_array_equal(drawn, masks.box_masks(boxes, (20, 30)))
        assert np.any(drawn)
    np.testing.assert_array_equal(
        mixing.cutmix_boxes(KEY, 4, 20, 30), mixing.cutmix_boxes(KEY, 4, 20, 30, "unimatch")
    )


def test_box_masks_by_hand():
    boxes = jax.jit(lambda boxes: masks.box_masks(boxes, (4, 6)))(
        np.array([[1, 2, 3, 5], [0, 0, 0, 0]])
    )
    expected = np.zeros((2, 4, 6), bool)
    expected[0, 1:3, 2:5] = True
    np.testing.assert_array_equal(boxes, expected)


def test_the_keys_of_images_depend_on_their_place_alone():
    many, few = jax.jit(
        lambda: [jax.random.key_data(keys) for keys in (image_keys(KEY, 8), image_keys(KEY, 3, 5))]
    )()
    np.testing.assert_array_equal(many[5:], few)
    assert len(np.unique(many, axis=0)) == 8
    assert (
        len(np.unique(np.transpose(draw_boxes("half_area_boxes", 4000, (129, 257))), axis=0)) > 3000
    )


# ---- partners


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, [1, 0, 3, 2, 5, 4, 7, 6]),
        ({"order": "next"}, [1, 0, 3, 2, 5, 4, 7, 6]),
        ({"group_size": 4}, [3, 2, 1, 0, 7, 6, 5, 4]),
        ({"group_size": 8}, [7, 6, 5, 4, 3, 2, 1, 0]),
        ({"group_size": 4, "order": "next"}, [1, 2, 3, 0, 5, 6, 7, 4]),
    ],
)
def test_partners(kwargs, expected):
    images = {"id": np.arange(8), "image": np.arange(8)[:, None, None] * np.ones((8, 2, 3))}
    moved = jax.jit(lambda images: mixing.partners(images, **kwargs))(images)
    np.testing.assert_array_equal(moved["id"], expected)
    np.testing.assert_array_equal(moved["image"][:, 1, 2], expected)
    assert np.all(moved["id"] != images["id"])


@pytest.mark.parametrize(("group_size", "order"), [(1, "next"), (1, "reversed"), (3, "reversed")])
def test_an_image_is_not_its_own_partner(group_size, order):
    with pytest.raises(ValueError, match=f"a group of {group_size} would be mixed with itself"):
        mixing.partners(jnp.arange(3), group_size, order)
    assert mixing.partners(jnp.arange(3), 3, "next").tolist() == [1, 2, 0]


def test_pairs_split_into_even_and_odd_images():
    even, odd = mixing.split_pairs({"id": jnp.arange(6)})
    np.testing.assert_array_equal(even["id"], [0, 2, 4])
    np.testing.assert_array_equal(odd["id"], [1, 3, 5])


@pytest.mark.parametrize(
    ("images", "devices", "kwargs", "nearest"),
    [
        *((8, 8, {}, 16), (1, 1, {}, 2), (3, 1, {}, 4), (0, 1, {}, 2), (36, 8, {}, 32)),
        *((4, 1, {"accumulate": 4}, 8), (6, 1, {"group_size": 4}, 8)),
    ],
)
def test_a_device_that_would_not_hold_whole_groups_is_refused(images, devices, kwargs, nearest):
    with raises_code(
        "batch-not-in-mixing-groups", f"train.batch_unlabeled is {images}", f"set it to {nearest},"
    ):
        mixing.check_group_size(images, devices, **kwargs)
    mixing.check_group_size(nearest, devices, **kwargs)


# ---- ClassMix


def test_half_of_the_classes_are_drawn_rounded_down():
    labels = jnp.asarray(arrays.teacher_classes())
    draw = jax.jit(jax.vmap(lambda key: mixing.class_masks(key, labels, arrays.CLASSES)))
    drawn = np.asarray(draw(jax.random.split(KEY, 300)))
    published = [len(classes) for classes in fixture("classmix")["chosen_classes"]]
    assert published == [2, 2, 1, 0]
    for image, (shown, count) in enumerate(zip(np.asarray(labels), published, strict=True)):
        for mask in drawn[:20, image]:
            chosen = np.unique(shown[mask])
            assert len(chosen) == count
            np.testing.assert_array_equal(mask, np.isin(shown, chosen))
        # Each class that the image shows is drawn equally often.
        shares = [drawn[:, image, shown == c].mean() for c in np.unique(shown)]
        np.testing.assert_allclose(shares, count / len(shares), atol=0.12)


def test_the_pixels_of_the_published_choice():
    published = fixture("classmix")
    classes = np.array([np.isin(np.arange(5), chosen) for chosen in published["chosen_classes"]])
    mask = jax.jit(mixing.pixels_of_classes)(arrays.teacher_classes(), classes)
    np.testing.assert_array_equal(np.sum(mask, axis=(1, 2)), published["mask_pixels"])


def test_padding_takes_no_part_in_the_choice_of_classes():
    labels = np.where(arrays.valid_pixels(1), arrays.teacher_classes(), IGNORE)
    assert np.all((labels == IGNORE).any(axis=(1, 2))[:1])
    class_masks = jax.jit(mixing.class_masks, static_argnums=(2, 3))
    mask = class_masks(KEY, labels, arrays.CLASSES, IGNORE)
    assert not np.any(mask & (labels == IGNORE))
    # A class that only padding would show is no class.
    one_class = np.where(labels == IGNORE, IGNORE, 2)
    assert not np.any(class_masks(KEY, one_class, arrays.CLASSES, IGNORE))
    # The ignored id may be below the number of classes: one class is left, of which half is none.
    two_ids = np.where(labels == IGNORE, 3, 1)
    assert np.any(class_masks(KEY, two_ids, arrays.CLASSES, IGNORE))
    assert not np.any(class_masks(KEY, two_ids, arrays.CLASSES, 3))


# ---- the mix


def test_mixed_images_are_those_of_the_published_code():
    @jax.jit
    def mix(masks, images):
        (one, two), (first, second, third, fourth) = masks, images
        return {
            "french2019": mixing.mix(one, second, first),
            "unimatch": mixing.mix(two, fourth, third),
            "unimatch_v2": mixing.mix(two, mixing.partners(third, group_size=4), third),
            "classmix": mixing.mix(one, first, mixing.partners(first, 4, "next")),
        }

    mixed = mix(
        [arrays.masks(seed) for seed in (1, 2)], [arrays.images(seed) for seed in (1, 2, 3, 4)]
    )
    for name, images in mixed.items():
        np.testing.assert_allclose(
            sample(images), fixture(name)["mixed_image"], rtol=1e-6, err_msg=name
        )


def test_all_arrays_of_a_view_are_mixed_by_one_mask():
    mask = arrays.masks(1)
    ids = np.arange(4)[:, None, None] * np.ones(mask.shape, np.int32)
    image = (ids[..., None] * np.ones(3)).astype(np.float32)
    view = {"image": image, "label": ids.astype(np.uint8), "valid": ids > 1}
    mixed = jax.jit(lambda mask, view: mixing.mix(mask, mixing.partners(view), view))(mask, view)
    expected = np.where(arrays.masks(1), np.array([1, 0, 3, 2])[:, None, None], ids)
    np.testing.assert_array_equal(mixed["label"], expected)
    np.testing.assert_array_equal(mixed["image"][..., 2], expected)
    np.testing.assert_array_equal(mixed["valid"], expected > 1)
    assert {k: v.dtype for k, v in mixed.items()} == {k: v.dtype for k, v in view.items()}
