"""Training batches of both streams, and batches of whole images."""

import collections
import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from semiseg_jax.data import batch_layout, image_io, input_pipeline, load
from semiseg_jax.runtime import fileio
from tests.errors import raises_code

PAD_VALUE = np.array([124, 116, 104], np.uint8)
PAPER_STREAMS = batch_layout.BatchSpec(("labeled",), ("pseudo",), 4, 4)


@pytest.fixture
def data(folder_config):
    return load.load_dataset(folder_config)


@pytest.fixture
def pseudo(data, tmp_path):
    """Returns pseudo-labelled examples; all pixels have class 1."""
    for example in data.unlabeled:
        shape = image_io.read_image(example.image).shape[:2]
        png = image_io.encode_mask(np.ones(shape, np.uint8), data.palette)
        fileio.write_bytes(tmp_path / "pseudo" / f"{example.id}.png", png)
    return input_pipeline.pseudo_examples(data, tmp_path / "pseudo")


def batches(
    config, data, pseudo, stage_streams=PAPER_STREAMS, steps=range(3), seed=(1, 2), **kwargs
):
    return list(
        input_pipeline.train_batches(
            config, data, pseudo, stage_streams, np.array(seed), steps, PAD_VALUE, **kwargs
        )
    )


def equal_batches(first, second):
    return all(
        np.array_equal(getattr(first, k), getattr(second, k))
        for k in ("image", "label", "is_pseudo", "seed", "ids")
    )


def test_batch_has_weak_labelled_and_strong_pseudo_labelled_images(folder_config, data, pseudo):
    (batch,) = batches(folder_config, data, pseudo, steps=range(1))
    assert batch.image.shape == (8, 32, 40, 3) and batch.image.dtype == np.uint8
    assert batch.label.shape == (8, 32, 40) and batch.label.dtype == np.uint8
    assert batch.is_pseudo.tolist() == [False] * 4 + [True] * 4
    assert set(batch.ids[:4]) <= {e.id for e in data.labeled}
    assert set(batch.ids[4:]) <= {e.id for e in data.unlabeled}
    assert set(np.unique(batch.label[4:])) <= {1, 255}
    padding = (batch.label == 255) & (batch.image == PAD_VALUE).all(-1)
    assert padding.any()


# With 4 images of each kind per step, an epoch of the 8 pseudo-labelled images has 2 steps, and
# an epoch of the 4 labelled images has 1 step.
THREE_EPOCHS = range(6)


@pytest.fixture
def few_operations(folder_config):
    """Returns a config with few operations, for which the graph is built faster."""
    folder_config.sda.ops = ("multiply", "noise_gau", "coarse_dropout")
    return folder_config


def sampled_view(config, data, pseudo, batch, index, strong):
    """Returns (id, geometry, operations with magnitudes) of an image of a batch, as numbers."""
    examples = pseudo if batch.is_pseudo[index] else data.labeled
    (example,) = (e for e in examples if e.id == batch.ids[index])
    size = image_io.image_size(example.image)
    geometry, operations = input_pipeline.sample_view(batch.seed[index], strong, size, config)
    numbers = [np.asarray(v).tolist() for v in dataclasses.astuple(geometry)]
    magnitudes = [(n, {k: np.asarray(v).tolist() for k, v in m.items()}) for n, m in operations]
    return (example.id, numbers, magnitudes)


def test_every_example_occurs_once_per_epoch_in_new_order(few_operations, data, pseudo):
    ids = [b.ids for b in batches(few_operations, data, pseudo, steps=range(12))]
    orders = set()
    for epoch in range(6):
        order = ids[2 * epoch][4:] + ids[2 * epoch + 1][4:]
        assert collections.Counter(order) == {e.id: 1 for e in data.unlabeled}
        orders.add(order)
        assert collections.Counter(ids[epoch][:4]) == {e.id: 1 for e in data.labeled}
    assert len(orders) == 6


def test_resuming_at_any_step_yields_the_same_batches(few_operations, data, pseudo):
    uninterrupted = batches(few_operations, data, pseudo, steps=THREE_EPOCHS)
    for step in THREE_EPOCHS:
        resumed = batches(few_operations, data, pseudo, steps=range(step, THREE_EPOCHS.stop))
        assert len(resumed) == THREE_EPOCHS.stop - step
        assert all(map(equal_batches, uninterrupted[step:], resumed))


def test_batches_do_not_depend_on_threads(folder_config, data, pseudo):
    runs = []
    for threads in (1, 8):
        folder_config.data.threads = threads
        runs.append(batches(folder_config, data, pseudo, steps=THREE_EPOCHS))
    assert all(map(equal_batches, *runs))


def test_shards_of_processes_equal_single_process_batch(few_operations, data, pseudo, monkeypatch):
    """The shards of four processes equal a single process's batches over three epochs.

    Each process reads only the files of its shard.
    """
    opened = []
    for name in ("read_image", "read_mask"):
        read = getattr(image_io, name)
        recording_read = functools.partial(
            lambda read, path, *a: opened.append(path) or read(path, *a), read
        )
        monkeypatch.setattr(image_io, name, recording_read)
    global_batches = batches(few_operations, data, pseudo, steps=THREE_EPOCHS)
    assert len(opened) == 2 * 8 * len(THREE_EPOCHS)
    for process in range(4):
        opened.clear()
        shards = batches(
            few_operations,
            data,
            pseudo,
            steps=THREE_EPOCHS,
            groups=4,
            process_index=process,
            process_count=4,
        )
        # One image of each stream, and its mask, in each step.
        assert len(opened) == 2 * 2 * len(THREE_EPOCHS)
        by_id = {e.id: e for e in (*data.labeled, *pseudo)}
        examples = [by_id[name] for shard in shards for name in shard.ids]
        assert set(opened) == {path for e in examples for path in (e.image, e.mask)}
        for global_batch, shard in zip(global_batches, shards, strict=True):
            # Block g holds image g of the weak stream and image g of the strong stream.
            for index, global_index in enumerate((process, 4 + process)):
                for key in ("image", "label", "is_pseudo", "seed", "ids"):
                    np.testing.assert_array_equal(
                        getattr(shard, key)[index], getattr(global_batch, key)[global_index]
                    )
    views = [
        sampled_view(few_operations, data, pseudo, batch, index, index >= 4)
        for batch in global_batches
        for index in range(8)
    ]
    # All views of the three epochs are different.
    assert len({repr(view) for view in views}) == len(views) == 48
    assert {name for *_, operations in views for name, _ in operations} == set(
        few_operations.sda.ops
    )


def test_sample_view_matches_geometry_of_batch(few_operations, data, pseudo):
    """The pixels outside the padding have the offset and the size of the sampled geometry."""
    (batch,) = batches(few_operations, data, pseudo, steps=range(1))
    for index in range(4, 8):
        _, (_, _, valid, offset, _), operations = sampled_view(
            few_operations, data, pseudo, batch, index, True
        )
        inside = np.argwhere(batch.label[index] != 255)  # All pseudo-labels are 1.
        np.testing.assert_array_equal(inside.min(0), offset)
        np.testing.assert_array_equal(inside.max(0) + 1 - inside.min(0), valid)
        assert len(operations) == 3


def test_batches_depend_on_seed(folder_config, data, pseudo):
    first, second = (
        batches(folder_config, data, pseudo, steps=range(1), seed=s) for s in ((1, 2), (1, 3))
    )
    assert not equal_batches(first[0], second[0])


def test_weak_stream_has_no_sda(folder_config, data, pseudo):
    """`sda.num_ops` changes the images of the strong stream, and nothing in the weak stream."""
    strong_only = batch_layout.BatchSpec((), ("labeled",), 4, 4)
    folder_config.sda.num_ops = 0
    (without_sda,) = batches(folder_config, data, pseudo, strong_only, steps=range(1))
    folder_config.sda.num_ops = 3
    (with_sda,) = batches(folder_config, data, pseudo, strong_only, steps=range(1))
    np.testing.assert_array_equal(without_sda.label, with_sda.label)
    assert not np.array_equal(without_sda.image, with_sda.image)
    weak_only = batch_layout.BatchSpec(("labeled",), (), 4, 4)
    folder_config.sda.num_ops = 3
    (with_sda,) = batches(folder_config, data, pseudo, weak_only, steps=range(1))
    folder_config.sda.num_ops = 0
    (without_sda,) = batches(folder_config, data, pseudo, weak_only, steps=range(1))
    assert equal_batches(with_sda, without_sda)


def test_sda_before_geometry(folder_config, data, pseudo):
    folder_config.sda.before_geometry = True
    (before,) = batches(folder_config, data, pseudo, steps=range(1))
    folder_config.sda.before_geometry = False
    (after,) = batches(folder_config, data, pseudo, steps=range(1))
    np.testing.assert_array_equal(before.label, after.label)
    assert not np.array_equal(before.image[4:], after.image[4:])


def test_sda_does_not_change_padding(folder_config, data, pseudo):
    folder_config.data.scale = (0.5, 0.5)
    (batch,) = batches(folder_config, data, pseudo, steps=range(1))
    # All pseudo-labels are 1, so only padding is 255.
    padding = batch.label[4:] == 255
    assert padding.mean() > 0.3
    assert (batch.image[4:][padding] == PAD_VALUE).all()


def test_damaged_image_raises_user_error(folder_config, data, pseudo):
    path = Path(data.labeled[0].image)
    path.write_bytes(path.read_bytes()[:60])
    with raises_code("image-undecodable", path.name):
        batches(folder_config, data, pseudo)


def test_label_kind_selects_the_id_table(folder_config, data, pseudo):
    """True labels are mapped by the data set's id table, pseudo-labels are class ids."""
    assert {e.label_kind for e in (*data.labeled, *data.evaluation)} == {"true"}
    assert {e.label_kind for e in data.unlabeled} == {None}
    assert {e.label_kind for e in pseudo} == {"pseudo"}
    assert dataclasses.replace(pseudo[0], mask=None).label_kind is None
    table = image_io.id_table(3, id_map=((0, 1), (1, 2), (2, 0)))
    mapped = dataclasses.replace(data, table=table)
    true_label = image_io.read_mask(data.evaluation[0].mask, table)
    (batch,) = input_pipeline.image_batches(data.evaluation[:1], mapped, 1, 1, PAD_VALUE)
    np.testing.assert_array_equal(batch.label[0], true_label)
    (batch,) = input_pipeline.image_batches(pseudo[:1], mapped, 1, 1, PAD_VALUE)
    assert (batch.label == 1).all()


CLOSED_EARLY = """
import sys, time
import numpy as np
from configs import default
from semiseg_jax.data import batch_layout, image_io, input_pipeline, load
from semiseg_jax.runtime.errors import UserError

read, count, damaged = image_io.read_image, 0, False
def slow_read(path):
    global count
    count += 1
    time.sleep(0.05)
    if damaged:
        raise UserError("This one is damaged.")
    return read(path)
image_io.read_image = slow_read

config = default.get_config()
config.data.name, config.data.root = "folder", sys.argv[1]
config.data.classes, config.data.crop = ("ground", "thing", "corner"), (16, 16)
config.data.threads = 4
data = load.load_dataset(config)
weak_only = batch_layout.BatchSpec(("labeled",), (), 4, 4)
seed, pad_value = np.array([1, 2]), np.zeros(3, np.uint8)
for damaged_later in (False, True):
    arguments = (config, data, (), weak_only, seed, range(1000), pad_value)
    batches = input_pipeline.train_batches(*arguments)
    try:
        for _ in range(2):
            next(batches)
        damaged = damaged_later
        while damaged:
            next(batches)
    except UserError as error:
        print(error)
    del batches
started = count
time.sleep(0.3)
print("reads after the end:", count - started)
"""


def test_closing_pipeline_early_stops_reads(folder_data):
    """After a deletion and after an error, the pipeline neither hangs nor reads further files."""
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_EARLY, str(folder_data)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.splitlines() == ["This one is damaged.", "reads after the end: 0"], (
        done.stderr
    )


def test_image_batches_contain_each_image_once(folder_config, data):
    batches = list(input_pipeline.image_batches(data.evaluation, data, 2, 1, PAD_VALUE))
    ids = collections.Counter(i for b in batches for i in b.ids)
    assert ids == {e.id: 1 for e in data.evaluation}
    assert {b.image.shape for b in batches} == {(2, 36, 48, 3), (2, 48, 36, 3)}
    for batch in batches:
        for i in range(len(batch.ids), 2):
            assert (batch.label[i] == 255).all()


def test_padded_images_are_at_the_upper_left(data):
    batches = list(input_pipeline.image_batches(data.evaluation, data, 2, 32, PAD_VALUE))
    assert {b.image.shape for b in batches} == {(2, 64, 64, 3)}
    by_id = {e.id: e for e in data.evaluation}
    for batch in batches:
        for i, name in enumerate(batch.ids):
            image = image_io.read_image(by_id[name].image)
            height, width = batch.sizes[i]
            assert (height, width) == image.shape[:2]
            np.testing.assert_array_equal(batch.image[i, :height, :width], image)
            outside = np.ones((64, 64), bool)
            outside[:height, :width] = False
            assert (batch.image[i][outside] == PAD_VALUE).all()
            assert (batch.label[i][outside] == 255).all()
        assert (batch.sizes[len(batch.ids) :] == 0).all()


def test_crops_of_labelled_images_alone_are_balanced(few_operations, data, pseudo):
    """Class 2 has 60 pixels in the upper left corner of each mask; pseudo-labels are all 1."""
    few_operations.data.crop = (8, 8)
    plain = batches(few_operations, data, pseudo, steps=range(12))
    few_operations.data.balance_crops = True
    balanced = batches(few_operations, data, pseudo, steps=range(12))

    def share(runs):
        return np.mean([np.any(b.label[:4] == 2, axis=(1, 2)) for b in runs])

    assert share(balanced) > 2 * share(plain) and share(balanced) > 0.5
    for before, after in zip(plain, balanced, strict=True):
        np.testing.assert_array_equal(before.image[4:], after.image[4:])
