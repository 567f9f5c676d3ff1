import collections

import numpy as np
import pytest
from PIL import Image

from semiseg_jax.data import labels, pipeline, sources, streams
from semiseg_jax.data.sources import Example
from semiseg_jax.errors import UserError

COLOUR = np.array([124, 116, 104], np.uint8)
PAPER = streams.Streams(("labeled",), ("pseudo",), 4, 4)


@pytest.fixture
def data(folder_config):
    return sources.load(folder_config)


@pytest.fixture
def pseudo(data, tmp_path):
    """Pseudo-labels that are all of class 1."""
    for example in data.unlabeled:
        shape = labels.read_image(example.image).shape[:2]
        png = labels.encode_mask(np.ones(shape, np.uint8), data.palette)
        labels.write_bytes(tmp_path / "pseudo" / f"{example.id}.png", png)
    return pipeline.pseudo_examples(data, tmp_path / "pseudo")


def batches(config, data, pseudo, taken=PAPER, steps=range(3), seed=(1, 2), **kwargs):
    made = pipeline.train_batches(
        config, data, pseudo, taken, np.array(seed), steps, COLOUR, **kwargs
    )
    return list(made)


def same(one, other):
    return all(
        np.array_equal(getattr(one, k), getattr(other, k))
        for k in ("image", "label", "is_pseudo", "ids")
    )


def test_a_batch_is_weak_labelled_and_strong_pseudo_labelled(folder_config, data, pseudo):
    (batch,) = batches(folder_config, data, pseudo, steps=range(1))
    assert batch.image.shape == (8, 32, 40, 3) and batch.image.dtype == np.uint8
    assert batch.label.shape == (8, 32, 40) and batch.label.dtype == np.uint8
    assert batch.is_pseudo.tolist() == [False] * 4 + [True] * 4
    assert set(batch.ids[:4]) <= {e.id for e in data.labeled}
    assert set(batch.ids[4:]) <= {e.id for e in data.unlabeled}
    assert set(np.unique(batch.label[4:])) <= {1, 255}
    padding = (batch.label == 255) & (batch.image == COLOUR).all(-1)
    assert padding.any()


def test_every_example_occurs_once_an_epoch_in_an_order_of_its_own(folder_config, data, pseudo):
    """8 pseudo-labelled images, 4 a step: an epoch is 2 steps; 4 labelled: 1 step."""
    ids = [b.ids for b in batches(folder_config, data, pseudo, steps=range(12))]
    orders = set()
    for epoch in range(6):
        seen = ids[2 * epoch][4:] + ids[2 * epoch + 1][4:]
        assert collections.Counter(seen) == {e.id: 1 for e in data.unlabeled}
        orders.add(seen)
        assert collections.Counter(ids[epoch][:4]) == {e.id: 1 for e in data.labeled}
    assert len(orders) == 6


def test_going_on_at_a_step_gives_what_was_to_come(folder_config, data, pseudo):
    whole = batches(folder_config, data, pseudo, steps=range(6))
    rest = batches(folder_config, data, pseudo, steps=range(4, 6))
    assert all(map(same, whole[4:], rest))


def test_threads_change_nothing(folder_config, data, pseudo):
    runs = []
    for threads in (1, 8):
        folder_config.data.threads = threads
        runs.append(batches(folder_config, data, pseudo, steps=range(3)))
    assert all(map(same, *runs))


def test_processes_and_groups_rearrange_and_change_nothing(folder_config, data, pseudo):
    (one,) = batches(folder_config, data, pseudo, steps=range(1))
    parts = [
        batches(
            folder_config, data, pseudo, steps=range(1), groups=4, process_index=i, process_count=4
        )[0]
        for i in range(4)
    ]
    # Block g of [weak; strong] holds image g of either stream.
    for g, part in enumerate(parts):
        for place, position in enumerate((g, 4 + g)):
            np.testing.assert_array_equal(part.image[place], one.image[position])
            np.testing.assert_array_equal(part.label[place], one.label[position])
            assert part.ids[place] == one.ids[position]


def test_other_seeds_give_other_batches(folder_config, data, pseudo):
    one, other = (
        batches(folder_config, data, pseudo, steps=range(1), seed=s) for s in ((1, 2), (1, 3))
    )
    assert not same(one[0], other[0])


def test_no_sda_in_the_weak_stream(folder_config, data, pseudo):
    """Both streams on the same images: with no operation drawn, strong is weak."""
    taken = streams.Streams((), ("labeled",), 4, 4)
    folder_config.sda.num_ops = 0
    (plain,) = batches(folder_config, data, pseudo, taken, steps=range(1))
    folder_config.sda.num_ops = 3
    (strong,) = batches(folder_config, data, pseudo, taken, steps=range(1))
    np.testing.assert_array_equal(plain.label, strong.label)
    assert not np.array_equal(plain.image, strong.image)
    taken = streams.Streams(("labeled",), (), 4, 4)
    folder_config.sda.num_ops = 3
    (weak,) = batches(folder_config, data, pseudo, taken, steps=range(1))
    folder_config.sda.num_ops = 0
    (again,) = batches(folder_config, data, pseudo, taken, steps=range(1))
    assert same(weak, again)


def test_sda_before_the_geometry(folder_config, data, pseudo):
    folder_config.sda.before_geometry = True
    (before,) = batches(folder_config, data, pseudo, steps=range(1))
    folder_config.sda.before_geometry = False
    (after,) = batches(folder_config, data, pseudo, steps=range(1))
    np.testing.assert_array_equal(before.label, after.label)
    assert not np.array_equal(before.image[4:], after.image[4:])


def test_padding_is_untouched_by_sda(folder_config, data, pseudo):
    folder_config.data.scale = (0.5, 0.5)
    (batch,) = batches(folder_config, data, pseudo, steps=range(1))
    # Pseudo-labels are 1 everywhere, so 255 is padding alone.
    padding = batch.label[4:] == 255
    assert padding.mean() > 0.3
    assert (batch.image[4:][padding] == COLOUR).all()


def test_a_damaged_image_is_one_sentence(folder_config, data, pseudo):
    from pathlib import Path

    path = Path(data.labeled[0].image)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="truncated, corrupt or not an image"):
        batches(folder_config, data, pseudo)


def test_whole_images_come_once_each_in_batches_of_one_size(folder_config, data):
    made = list(pipeline.image_batches(data.evaluation, data, 2, 1, COLOUR))
    assert collections.Counter(i for b in made for i in b.ids) == {e.id: 1 for e in data.evaluation}
    assert {b.image.shape for b in made} == {(2, 36, 48, 3), (2, 48, 36, 3)}
    for batch in made:
        for i in range(len(batch.ids), 2):
            assert (batch.label[i] == 255).all()


def test_padded_images_stand_at_the_upper_left_of_the_mean_colour(data):
    made = list(pipeline.image_batches(data.evaluation, data, 2, 32, COLOUR))
    assert {b.image.shape for b in made} == {(2, 64, 64, 3)}
    by_id = {e.id: e for e in data.evaluation}
    for batch in made:
        for i, name in enumerate(batch.ids):
            image = labels.read_image(by_id[name].image)
            height, width = batch.sizes[i]
            assert (height, width) == image.shape[:2]
            np.testing.assert_array_equal(batch.image[i, :height, :width], image)
            outside = np.ones((64, 64), bool)
            outside[:height, :width] = False
            assert (batch.image[i][outside] == COLOUR).all()
            assert (batch.label[i][outside] == 255).all()
        assert (batch.sizes[len(batch.ids) :] == 0).all()


@pytest.mark.parametrize(("count", "pad_to", "expected"), [(8, 64, 1), (9, 64, 64), (9, 1, 1)])
def test_a_set_of_few_sizes_is_not_padded(tmp_path, count, pad_to, expected):
    examples = []
    for i in range(2 * count):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (40 + i % count, 30)).save(path)
        examples.append(Example(str(i), str(path), None))
    assert pipeline.padding_for(examples, pad_to) == expected
