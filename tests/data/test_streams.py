import numpy as np
import pytest

from semiseg_jax.data import streams
from semiseg_jax.errors import UserError

PAPER = streams.Streams(("labeled",), ("pseudo",), 4, 8)


def test_blocks_hold_weak_then_strong_images():
    joined = streams.slots(PAPER, groups=4)
    assert joined.strong.tolist() == [False, True, True] * 4
    assert joined.pseudo.tolist() == joined.strong.tolist()
    assert joined.position[~joined.strong].tolist() == [0, 1, 2, 3]
    assert joined.position[joined.strong].tolist() == list(range(8))
    assert joined.per_step.tolist() == [4, 8, 8] * 4


def test_processes_hold_consecutive_blocks():
    whole = streams.slots(PAPER, groups=4)
    parts = [streams.slots(PAPER, 4, i, 2) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([p.position for p in parts]), whole.position)


def test_micro_batches_hold_the_same_images_on_any_number_of_devices():
    """By hand: 8 strong images in two micro-batches are 0…3 and 4…7, however many devices."""
    parts = streams.Streams(("labeled",), ("pseudo",), 4, 8, parts=2)
    for groups in (1, 2):
        joined = streams.slots(parts, groups)
        blocks = joined.position.reshape(groups, 2, -1)
        strong = joined.strong.reshape(blocks.shape)
        assert (np.diff(strong.astype(int), axis=-1) >= 0).all()  # weak first in each block
        for part in range(2):
            turn, is_strong = blocks[:, part].ravel(), strong[:, part].ravel()
            assert sorted(turn[is_strong]) == list(range(4 * part, 4 * part + 4))
            assert sorted(turn[~is_strong]) == list(range(2 * part, 2 * part + 2))


def test_a_stream_of_both_kinds_holds_a_batch_of_each():
    """The released code's streams: labelled and pseudo-labelled images in both."""
    both = ("labeled", "pseudo")
    joined = streams.slots(streams.Streams(both, both, 2, 3), groups=1)
    assert joined.strong.tolist() == [False] * 5 + [True] * 5
    assert joined.pseudo.tolist() == [False, False, True, True, True] * 2
    assert joined.rank.tolist() == [0, 1, 0, 1, 2] * 2
    assert joined.position.tolist() == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize(
    ("weak", "strong", "domain"),
    [
        (("labeled",), ("pseudo",), "both"),
        (("labeled", "pseudo"), (), "weak"),
        ((), ("pseudo",), "strong"),
    ],
)
def test_domain(weak, strong, domain):
    assert streams.Streams(weak, strong, 4, 4).domain == domain


def test_a_batch_that_does_not_divide_is_one_sentence():
    with pytest.raises(UserError, match="weak stream's 4 images do not divide over 3 devices"):
        streams.slots(PAPER, groups=3)
    parts = streams.Streams(("labeled",), ("pseudo",), 4, 8, parts=4)
    with pytest.raises(UserError, match=r"over 2 devices, 4 times each: make .* multiples of 8"):
        streams.slots(parts, groups=2)


def test_stage_seeds_differ():
    seeds = {
        tuple(streams.stage_seed(s, r, k))
        for s in (0, 1, -1)
        for r in (0, 1)
        for k in streams.STAGES
    }
    assert len(seeds) == 18
