"""The padding rule, and the shapes of prediction batches."""

import pytest

from semiseg_jax.shape_buckets import ShapeBuckets, pad_multiple, pad_size

MANY_SIZES = [(30, 40 + i) for i in range(9)]


@pytest.mark.parametrize(("count", "pad_to", "expected"), [(8, 64, 1), (9, 64, 64), (9, 1, 1)])
def test_set_with_few_sizes_is_not_padded(count, pad_to, expected):
    assert pad_multiple(2 * MANY_SIZES[:count], pad_to) == expected


def test_sides_are_rounded_up():
    assert pad_size((31, 64), 32) == (32, 64)
    assert pad_size((31, 64), 1) == (31, 64)


def make_buckets(sizes, **changes):
    settings = {"pad_to": 16, "exact_sizes": (), "max_pixels": 2**22, "batch_size": 4}
    return ShapeBuckets(sizes, **(settings | {"num_devices": 1} | changes))


def test_only_sizes_that_were_not_evaluated_are_padded():
    buckets = make_buckets(MANY_SIZES, exact_sizes=[(30, 40)])
    assert buckets.padded_size((30, 40)) == (30, 40)
    assert buckets.padded_size((30, 41)) == (32, 48)
    assert make_buckets(MANY_SIZES[:8]).padded_size((30, 41)) == (30, 41)


def test_every_size_is_padded_if_evaluation_padded():
    assert make_buckets([(30, 40)], exact_sizes=None).padded_size((30, 40)) == (32, 48)


def test_tiles_and_batches_stay_within_the_pixel_limit():
    sizes = [(600, 10_000), (3000, 4000), (1000, 1000), (37, 51), (48, 36)]
    buckets = make_buckets(sizes)
    tiles = [buckets.tile_size(size) for size in sizes]
    assert tiles == [(600, 2048), (2048, 2048), (1000, 1000), (37, 51), (48, 36)]
    assert [buckets.batch_size(tile) for tile in tiles] == [3, 1, 4, 4, 4]


def test_batches_are_multiples_of_the_device_count_and_no_larger_than_the_set():
    assert make_buckets([(8, 8)] * 3, num_devices=2).batch_size((8, 8)) == 4
    assert make_buckets([(8, 8)], num_devices=2).batch_size((8, 8)) == 2
