import collections
import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

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
        for k in ("image", "label", "is_pseudo", "seed", "ids")
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


# 8 pseudo-labelled images, 4 a step: an epoch is 2 steps; 4 labelled: 1 step.
THREE_EPOCHS = range(6)


@pytest.fixture
def few_operations(folder_config):
    """Fewer are built faster, and here their number does not matter."""
    folder_config.sda.ops = ("multiply", "noise_gau", "coarse_dropout")
    return folder_config


def drawn(config, data, pseudo, batch, place, strong):
    """(id, geometry, operations, magnitudes) of one image of a batch, as plain numbers."""
    kind = pseudo if batch.is_pseudo[place] else data.labeled
    (example,) = (e for e in kind if e.id == batch.ids[place])
    size = labels.image_size(example.image)
    geometry, operations = pipeline.view_draws(batch.seed[place], strong, size, config)
    numbers = [np.asarray(v).tolist() for v in dataclasses.astuple(geometry)]
    named = [(n, {k: np.asarray(v).tolist() for k, v in m.items()}) for n, m in operations]
    return (example.id, numbers, named)


def test_every_example_occurs_once_an_epoch_in_an_order_of_its_own(few_operations, data, pseudo):
    ids = [b.ids for b in batches(few_operations, data, pseudo, steps=range(12))]
    orders = set()
    for epoch in range(6):
        seen = ids[2 * epoch][4:] + ids[2 * epoch + 1][4:]
        assert collections.Counter(seen) == {e.id: 1 for e in data.unlabeled}
        orders.add(seen)
        assert collections.Counter(ids[epoch][:4]) == {e.id: 1 for e in data.labeled}
    assert len(orders) == 6


def test_going_on_at_any_step_gives_what_was_to_come(few_operations, data, pseudo):
    whole = batches(few_operations, data, pseudo, steps=THREE_EPOCHS)
    for step in THREE_EPOCHS:
        rest = batches(few_operations, data, pseudo, steps=range(step, THREE_EPOCHS.stop))
        assert len(rest) == THREE_EPOCHS.stop - step
        assert all(map(same, whole[step:], rest))


def test_threads_change_nothing(folder_config, data, pseudo):
    runs = []
    for threads in (1, 8):
        folder_config.data.threads = threads
        runs.append(batches(folder_config, data, pseudo, steps=THREE_EPOCHS))
    assert all(map(same, *runs))


def test_processes_share_what_one_would_do_alone(few_operations, data, pseudo, monkeypatch):
    """Four processes in three epochs: the same images, crops, operations and magnitudes, and each
    process opens no file but those of its share."""
    opened = []
    for name in ("read_image", "read_mask"):
        read = getattr(labels, name)
        watched = functools.partial(
            lambda read, path, *a: opened.append(path) or read(path, *a), read
        )
        monkeypatch.setattr(labels, name, watched)
    alone = batches(few_operations, data, pseudo, steps=THREE_EPOCHS)
    assert len(opened) == 2 * 8 * len(THREE_EPOCHS)
    for process in range(4):
        opened.clear()
        parts = batches(
            few_operations,
            data,
            pseudo,
            steps=THREE_EPOCHS,
            groups=4,
            process_index=process,
            process_count=4,
        )
        # An image of either stream, and its mask, in each step.
        assert len(opened) == 2 * 2 * len(THREE_EPOCHS)
        by_id = {e.id: e for e in (*data.labeled, *pseudo)}
        shares = [by_id[name] for part in parts for name in part.ids]
        assert set(opened) == {path for e in shares for path in (e.image, e.mask)}
        for one, part in zip(alone, parts, strict=True):
            # Block g of [weak; strong] holds image g of either stream.
            for place, position in enumerate((process, 4 + process)):
                for key in ("image", "label", "is_pseudo", "seed", "ids"):
                    mine, its = getattr(part, key)[place], getattr(one, key)[position]
                    np.testing.assert_array_equal(mine, its)
    draws = [
        drawn(few_operations, data, pseudo, batch, place, place >= 4)
        for batch in alone
        for place in range(8)
    ]
    # No two views of the three epochs are drawn alike.
    assert len({repr(d) for d in draws}) == len(draws) == 48
    assert {name for *_, operations in draws for name, _ in operations} == set(
        few_operations.sda.ops
    )


def test_a_seed_tells_the_geometry_of_its_view(few_operations, data, pseudo):
    """An independent count: what is not padding is as large as the geometry says."""
    (batch,) = batches(few_operations, data, pseudo, steps=range(1))
    for place in range(4, 8):
        _, (_, _, valid, corner, _), operations = drawn(
            few_operations, data, pseudo, batch, place, True
        )
        inside = np.argwhere(batch.label[place] != 255)  # these pseudo-labels are 1 throughout
        np.testing.assert_array_equal(inside.min(0), corner)
        np.testing.assert_array_equal(inside.max(0) + 1 - inside.min(0), valid)
        assert len(operations) == 3


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
    path = Path(data.labeled[0].image)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="truncated, corrupt or not an image"):
        batches(folder_config, data, pseudo)


LEFT_EARLY = """
import sys, time
import numpy as np
from configs import default
from semiseg_jax.data import labels, pipeline, sources, streams
from semiseg_jax.errors import UserError

read, count, damaged = labels.read_image, 0, False
def slow_read(path):
    global count
    count += 1
    time.sleep(0.05)
    if damaged:
        raise UserError("This one is damaged.")
    return read(path)
labels.read_image = slow_read

config = default.get_config()
config.data.name, config.data.root = "folder", sys.argv[1]
config.data.classes, config.data.crop = ("ground", "thing", "corner"), (16, 16)
config.data.threads = 4
data = sources.load(config)
taken = streams.Streams(("labeled",), (), 4, 4)
seed, colour = np.array([1, 2]), np.zeros(3, np.uint8)
for damaged_later in (False, True):
    made = pipeline.train_batches(config, data, (), taken, seed, range(1000), colour)
    try:
        for _ in range(2):
            next(made)
        damaged = damaged_later
        while damaged:
            next(made)
    except UserError as error:
        print(error)
    del made
started = count
time.sleep(0.3)
print("reads after the end:", count - started)
"""


def test_a_pipeline_that_is_left_early_ends(folder_data):
    """Dropped in the middle, and by an error, it neither hangs nor reads on."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT_EARLY, str(folder_data)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.splitlines() == ["This one is damaged.", "reads after the end: 0"], (
        done.stderr
    )


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
