"""The layout of the batch, and the seeds of stages."""

import numpy as np
import pytest

from semiseg_jax import stages
from semiseg_jax.data import batch_layout
from semiseg_jax.data.views import Views
from tests.errors import raises_code

PAPER_STREAMS = batch_layout.BatchSpec(("labeled",), ("pseudo",), 4, 8)


def test_blocks_hold_weak_then_strong_images():
    layout = batch_layout.lay_out_batch(PAPER_STREAMS, groups=4)
    assert layout.strong.tolist() == [False, True, True] * 4
    assert layout.pseudo.tolist() == layout.strong.tolist()
    assert layout.position[~layout.strong].tolist() == [0, 1, 2, 3]
    assert layout.position[layout.strong].tolist() == list(range(8))
    assert layout.per_step.tolist() == [4, 8, 8] * 4


def test_processes_hold_consecutive_blocks():
    global_layout = batch_layout.lay_out_batch(PAPER_STREAMS, groups=4)
    shards = [batch_layout.lay_out_batch(PAPER_STREAMS, 4, i, 2) for i in range(2)]
    positions = np.concatenate([shard.position for shard in shards])
    np.testing.assert_array_equal(positions, global_layout.position)


def test_micro_batches_do_not_depend_on_number_of_devices():
    """The 8 strong images in two micro-batches are 0…3 and 4…7 on any number of devices."""
    two_micro_batches = batch_layout.BatchSpec(("labeled",), ("pseudo",), 4, 8, accum_steps=2)
    for groups in (1, 2):
        layout = batch_layout.lay_out_batch(two_micro_batches, groups)
        blocks = layout.position.reshape(groups, 2, -1)
        strong = layout.strong.reshape(blocks.shape)
        assert (np.diff(strong.astype(int), axis=-1) >= 0).all()  # weak first in each block
        for i in range(2):
            positions, is_strong = blocks[:, i].ravel(), strong[:, i].ravel()
            assert sorted(positions[is_strong]) == list(range(4 * i, 4 * i + 4))
            assert sorted(positions[~is_strong]) == list(range(2 * i, 2 * i + 2))


def test_stream_with_both_kinds_holds_a_batch_of_each():
    """As in the released code, both streams hold labelled and pseudo-labelled images."""
    both = ("labeled", "pseudo")
    layout = batch_layout.lay_out_batch(batch_layout.BatchSpec(both, both, 2, 3), groups=1)
    assert layout.strong.tolist() == [False] * 5 + [True] * 5
    assert layout.pseudo.tolist() == [False, False, True, True, True] * 2
    assert layout.rank.tolist() == [0, 1, 0, 1, 2] * 2
    assert layout.position.tolist() == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize(
    ("weak", "strong", "domain"),
    [
        (("labeled",), ("pseudo",), "both"),
        (("labeled", "pseudo"), (), "weak"),
        ((), ("pseudo",), "strong"),
    ],
)
def test_domain(weak, strong, domain):
    assert batch_layout.BatchSpec(weak, strong, 4, 4).domain == domain


def test_indivisible_batch_raises():
    with raises_code("stream-batch-not-divisible", "weak stream", "4 images", "3 devices"):
        batch_layout.lay_out_batch(PAPER_STREAMS, groups=3)
    four_micro_batches = batch_layout.BatchSpec(("labeled",), ("pseudo",), 4, 8, accum_steps=4)
    with raises_code("stream-batch-not-divisible", "2 devices, 4 times", "multiples of 8"):
        batch_layout.lay_out_batch(four_micro_batches, groups=2)


def with_views(batch_unlabeled, partner="other_image", accum_steps=1):
    return batch_layout.BatchSpec(
        ("labeled",), (), 8, 8, accum_steps, Views(1, 2, partner), batch_unlabeled
    )


def test_unlabelled_images_are_in_consecutive_blocks():
    assert batch_layout.lay_out_unlabeled(with_views(6), 1).tolist() == list(range(6))
    shards = [batch_layout.lay_out_unlabeled(with_views(8), 4, i, 2) for i in range(2)]
    assert [shard.tolist() for shard in shards] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_micro_batches_of_unlabelled_images_do_not_depend_on_number_of_devices():
    """The 8 images in two micro-batches are 0…3 and 4…7 on any number of devices."""
    spec = with_views(8, accum_steps=2)
    for groups in (1, 2, 4):
        positions = batch_layout.lay_out_unlabeled(spec, groups).reshape(groups, 2, -1)
        for i in range(2):
            assert sorted(positions[:, i].ravel()) == list(range(4 * i, 4 * i + 4))
    shards = [batch_layout.lay_out_unlabeled(spec, 2, i, 2).tolist() for i in range(2)]
    assert shards == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_indivisible_unlabelled_batch_raises():
    with raises_code("unlabeled-batch-not-divisible", "6 unlabelled images", "4 devices"):
        batch_layout.lay_out_unlabeled(with_views(6), 4)
    with raises_code("unlabeled-batch-not-divisible", "2 devices, 2 times", "multiple of 4"):
        batch_layout.lay_out_unlabeled(with_views(6, accum_steps=2), 2)


@pytest.mark.parametrize(
    ("images", "groups", "accum_steps", "nearest"),
    [(8, 8, 1, 16), (1, 1, 1, 2), (3, 1, 1, 4), (20, 8, 1, 16), (12, 2, 2, 16), (4, 2, 2, 8)],
)
def test_pairs_that_devices_would_part_are_refused(images, groups, accum_steps, nearest):
    spec = with_views(images, accum_steps=accum_steps)
    with raises_code("unlabeled-batch-not-in-pairs", "train.batch_unlabeled", f"as {nearest}."):
        batch_layout.check_pairs(spec, groups)
    batch_layout.check_pairs(with_views(nearest, accum_steps=accum_steps), groups)
    if not images % (groups * accum_steps):
        # Only pairs of one image must stay together; not every method mixes.
        batch_layout.lay_out_unlabeled(spec, groups)
        with raises_code("unlabeled-batch-not-in-pairs"):
            of_one_image = with_views(images, "same_image", accum_steps)
            batch_layout.lay_out_unlabeled(of_one_image, groups)


def test_views_need_unlabelled_images():
    for views, images in ((Views(1, 2), 0), (None, 4)):
        with pytest.raises(ValueError):
            batch_layout.BatchSpec(("labeled",), (), 4, 4, 1, views, images)


def test_stage_seeds_differ():
    seeds = {
        tuple(stages.stage_seed(s, r, k)) for s in (0, 1, -1) for r in (0, 1) for k in stages.KINDS
    }
    assert len(seeds) == 18
