"""Views of unlabelled images: of one image, and in the batches of a stage."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from semiseg_jax.data import (
    batch_layout,
    color_jitter,
    image_io,
    input_pipeline,
    load,
    view_augment,
    weak_augment,
)
from semiseg_jax.data.views import Views
from tests.conftest import tiny_config
from tests.errors import raises_code

PAD_VALUE = np.array([124, 116, 104], np.uint8)
SEED = np.array([1, 2])
WEAK = Views(weak=1, strong=0)
WEAK_AND_TWO_STRONG = Views(weak=1, strong=2)
NO_COLORS = {
    "method.views.jitter_probability": 0.0,
    "method.views.grey_probability": 0.0,
    "method.views.blur_probability": 0.0,
}


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def augment(image, config, views=WEAK_AND_TWO_STRONG, geometry_seed=(1, 2), color_seed=(3, 4)):
    """Returns `augment_views` as arrays."""
    seeds = (tf.constant(seed, tf.int64) for seed in (geometry_seed, color_seed))
    stack, valid = view_augment.augment_views(
        tf.constant(image), views, *seeds, config=config, pad_value=PAD_VALUE
    )
    return stack.numpy(), valid.numpy()


# ---------------------------------------------------------------- one image


@pytest.mark.parametrize(
    "arguments", [(2, 1), (-1, 1), (0, 0), (1, -1), (1, 1, "other"), (0, 1, None)]
)
def test_impossible_views_are_refused(arguments):
    # In tests the types are checked first.
    with pytest.raises((ValueError, TypeError)):
        Views(*arguments)


@pytest.mark.parametrize(
    "no_colors", [NO_COLORS, {"method.views.kind": "sda", "sda.num_ops": 0}], ids=["jitter", "sda"]
)
def test_all_views_have_the_geometry_of_the_weak_one(no_colors):
    """Without a change of colour, all views are the crop of weak augmentation, to the byte."""
    config = tiny_config(**no_colors)
    image = photo(36, 48)
    for seed in range(5):
        stack, valid = augment(image, config, geometry_seed=(seed, 0))
        crop, label = weak_augment.pad(
            *weak_augment.random_crop(
                tf.constant(image), tf.ones((36, 48), tf.uint8), tf.constant([seed, 0]), config.data
            ),
            config.data.crop,
            PAD_VALUE,
        )
        for view in stack:
            np.testing.assert_array_equal(view, crop)
        np.testing.assert_array_equal(valid, label.numpy() == 1)


@pytest.mark.parametrize("weak", [0, 1])
def test_the_weak_view_is_the_first(weak):
    config = tiny_config(method__views__jitter_probability=1.0)
    image = photo(36, 48)
    both, _ = augment(image, config)
    stack, _ = augment(image, config, Views(weak, 1))
    assert stack.shape == (weak + 1, 32, 40, 3) and stack.dtype == np.uint8
    # The colours of a strong view do not depend on how many views there are.
    np.testing.assert_array_equal(stack, both[1 - weak : 2])
    only_weak, _ = augment(image, config, Views(1, 0))
    np.testing.assert_array_equal(only_weak, both[:1])


def test_strong_views_draw_their_own_colours():
    config = tiny_config(method__views__jitter_probability=1.0)
    image = photo(36, 48)
    stack, _ = augment(image, config)
    others, _ = augment(image, config, color_seed=(3, 5))
    np.testing.assert_array_equal(stack[0], others[0])
    strong = [*stack, *others[1:]]
    for a, b in itertools.combinations(strong, 2):
        assert not np.array_equal(a, b)


@pytest.mark.parametrize("kind", view_augment.KINDS)
def test_padding_is_the_mean_colour_in_every_view(kind):
    """An image of 100x100 pixels in a crop of 129x129."""
    config = tiny_config(
        data__crop=(129, 129),
        data__scale=(1.0, 1.0),
        method__views__kind=kind,
        method__views__blur_probability=1.0,
        sda__ops=("invert_channel", "contrast_linear"),
    )
    image = photo(100, 100)
    stack, valid = augment(image, config)
    inside = np.argwhere(valid)
    (top, left), (bottom, right) = inside.min(0), inside.max(0) + 1
    assert (bottom - top, right - left) == (100, 100) and valid.sum() == 100**2
    assert (stack[:, ~valid] == PAD_VALUE).all()
    crops = stack[:, top:bottom, left:right]
    assert not any(np.array_equal(crops[0], strong) for strong in crops[1:])
    if kind == "jitter":
        # Contrast and blur are those of an image that never had padding.
        for number, crop in enumerate(crops[1:]):
            seed = tf.random.experimental.stateless_fold_in(
                tf.constant([3, 4], tf.int64), tf.constant(number, tf.int64)
            )
            expected = color_jitter.color_augment(tf.constant(crops[0]), seed, config.method.views)
            np.testing.assert_array_equal(crop, expected)


def test_dropped_pixels_of_sda_stay_valid():
    """As in the strong stream, where their labels stay: the network is to fill them in."""
    config = tiny_config(
        data__scale=(1.0, 1.0),
        method__views__kind="sda",
        sda__ops=("coarse_dropout",),
        sda__magnitude="released",
    )
    stack, valid = augment(photo(36, 48).clip(1), config)
    assert valid.all()
    assert (stack[0] > 0).all() and (stack[1:] == 0).mean() > 0.1


def test_sda_before_geometry_keeps_the_views_aligned():
    """At scale 1, operations on single values commute with the crop."""
    views = []
    for before in (False, True):
        config = tiny_config(
            data__scale=(1.0, 1.0),
            method__views__kind="sda",
            sda__before_geometry=before,
            sda__ops=("multiply", "solarize", "contrast_gamma"),
        )
        views.append(augment(photo(50, 60), config)[0])
    np.testing.assert_array_equal(*views)
    assert not np.array_equal(views[0][0], views[0][1])


# ---------------------------------------------------------------- batches


CONTROL = batch_layout.BatchSpec(("labeled",), (), 4, 4)


def with_views(views=WEAK_AND_TWO_STRONG, batch_unlabeled=4, accum_steps=1):
    return dataclasses.replace(
        CONTROL, views=views, batch_unlabeled=batch_unlabeled, accum_steps=accum_steps
    )


@pytest.fixture(autouse=True)
def few_operations(folder_config):
    """The graph is built faster without SDA of the labelled images, and without hue."""
    folder_config.sda.num_ops = 0
    folder_config.method.views.jitter = (0.5, 0.5, 0.0, 0.0)
    folder_config.method.views.jitter_probability = 1.0


@pytest.fixture
def data(folder_config):
    return load.load_dataset(folder_config)


def batches(config, data, spec, steps=range(3), **kwargs):
    return list(
        input_pipeline.train_batches(config, data, (), spec, SEED, steps, PAD_VALUE, **kwargs)
    )


def assert_equal(first, second):
    for a, b in zip(vars(first).values(), vars(second).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_views_leave_the_labelled_images_as_they_are(folder_config, data):
    """They are those of the control, to the byte; a stage without views has none."""
    (control,) = batches(folder_config, data, CONTROL, range(1))
    assert (control.views, control.valid, control.unlabeled_ids) == (None, None, ())
    (batch,) = batches(folder_config, data, with_views(batch_unlabeled=6), range(1))
    labeled = dataclasses.replace(batch, views=None, valid=None, unlabeled_ids=())
    assert_equal(labeled, control)
    assert batch.views.shape == (6, 3, 32, 40, 3) and batch.views.dtype == np.uint8
    assert batch.valid.shape == (6, 32, 40) and batch.valid.dtype == bool
    assert len(set(batch.unlabeled_ids)) == 6
    assert set(batch.unlabeled_ids) <= {e.id for e in data.unlabeled}


def test_a_stage_without_views_reads_no_unlabelled_image(folder_config, data):
    for example in data.unlabeled:
        Path(example.image).unlink()
    batches(folder_config, data, CONTROL, range(1))
    with raises_code("image-missing"):
        batches(folder_config, data, with_views(WEAK), range(1))


def test_views_differ_between_steps_and_images(folder_config, data):
    """All strong views of six steps differ, which are three epochs of the images."""
    strong = [b.views[:, 1:] for b in batches(folder_config, data, with_views(), range(6))]
    views = {view.tobytes() for view in np.concatenate(strong).reshape(-1, 32 * 40 * 3)}
    assert len(views) == 6 * 4 * 2


def test_views_do_not_depend_on_processes_threads_or_restarts(folder_config, data):
    """Shards of two processes of two devices each, in two micro-batches, from step 1."""
    folder_config.data.threads = 1
    (*_, whole) = batches(folder_config, data, with_views(batch_unlabeled=8), range(3))
    folder_config.data.threads = 8
    spec = with_views(batch_unlabeled=8, accum_steps=2)
    found = {}
    for process in range(2):
        (_, shard) = batches(
            folder_config,
            data,
            dataclasses.replace(spec, batch_labeled=8),
            range(1, 3),
            groups=4,
            process_index=process,
            process_count=2,
        )
        positions = batch_layout.lay_out_unlabeled(spec, 4, process, 2)
        assert len(shard.views) == 4
        for i, position in enumerate(positions):
            found[int(position)] = process
            np.testing.assert_array_equal(shard.views[i], whole.views[position])
            np.testing.assert_array_equal(shard.valid[i], whole.valid[position])
            assert shard.unlabeled_ids[i] == whole.unlabeled_ids[position]
    assert found.keys() == set(range(8)) and set(found.values()) == {0, 1}


def indices(size, per_step, steps, partner="other_image"):
    """Returns the indices of the unlabelled examples, [steps, per_step]."""
    spec = with_views(Views(1, 1, partner), per_step)
    index = tf.autograph.experimental.do_not_convert(
        lambda n: input_pipeline._unlabeled_index(n // per_step, n % per_step, spec, SEED, size)
    )
    numbers = tf.data.Dataset.range(steps * per_step).map(index)
    return np.array(list(numbers.as_numpy_iterator())).reshape(steps, per_step)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("per_step", [2, 3])
def test_an_epoch_has_every_image_once_and_no_image_is_its_own_partner(size, per_step):
    """Also across the end of an epoch, where the same image may be last and first."""
    sequence = indices(size, per_step, 80 * size // per_step).ravel()
    epochs = sequence[: sequence.size // size * size].reshape(-1, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    assert (sequence[1:] != sequence[:-1]).all()
    if size > 2:
        orders, counts = np.unique(epochs, axis=0, return_counts=True)
        assert len(orders) >= min(6, len(epochs) // 3) and counts.max() < len(epochs) / 2


def test_a_single_unlabelled_image_repeats():
    assert (indices(1, 4, 3) == 0).all()


def test_partners_of_the_same_image_are_two_crops_of_it(folder_config, data):
    config = folder_config
    config.data.crop, config.data.scale, config.data.mirror = (16, 16), (1.0, 1.0), False
    images = {e.id: image_io.read_image(e.image) for e in data.unlabeled}
    spec = with_views(Views(1, 0, "same_image"), 4)
    for batch in batches(config, data, spec, range(4)):
        ids = batch.unlabeled_ids
        assert ids[0] == ids[1] != ids[2] == ids[3]
        for pair in (0, 2):
            assert not np.array_equal(batch.views[pair, 0], batch.views[pair + 1, 0])
        for name, (crop,) in zip(ids, batch.views, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(images[name], (16, 16, 3))
            assert (windows == crop).all((-1, -2, -3)).any()
    places = indices(5, 4, 10, "same_image")
    np.testing.assert_array_equal(places[:, ::2], places[:, 1::2])
    epochs = places[:, ::2].reshape(-1, 5)
    assert (np.sort(epochs, axis=1) == np.arange(5)).all()


@pytest.mark.parametrize("per_batch", [False, True])
def test_colours_can_be_drawn_once_for_the_batch(folder_config, data, per_batch):
    views = {"jitter_probability": 0.0, "grey_probability": 0.5, "blur_probability": 0.0}
    folder_config.method.views.update(views | {"per_batch": per_batch})
    patterns = []
    for batch in batches(folder_config, data, with_views(), range(6)):
        inside = batch.valid[:, None, :, :, None]
        is_grey = (batch.views == batch.views[..., :1]) | ~inside
        patterns.append(is_grey.all((2, 3, 4))[:, 1:])
    patterns = np.array(patterns)  # [step, image, strong view]
    assert patterns.any() and not patterns.all()
    assert (patterns == patterns[:, :1]).all() == per_batch
    assert (patterns[..., 0] != patterns[..., 1]).any()


def test_downscaled_images_are_seen_downscaled(folder_config):
    folder_config.data.downscale = 2
    folder_config.data.scale = (1.0, 1.0)
    data = load.load_dataset(folder_config)
    (batch,) = batches(folder_config, data, with_views(WEAK), range(1))
    assert set(batch.valid.sum((1, 2))) == {18 * 24}


def test_views_without_unlabelled_images_are_refused(folder_config, data):
    with raises_code("train-images-missing", "unlabeled"):
        batches(folder_config, dataclasses.replace(data, unlabeled=()), with_views(WEAK))


def test_an_unreadable_unlabelled_image_is_named(folder_config, data):
    path = Path(data.unlabeled[0].image)
    path.write_bytes(path.read_bytes()[:60])
    with raises_code("image-undecodable", path.name):
        batches(folder_config, data, with_views(WEAK))
