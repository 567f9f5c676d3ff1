"""Tables of the point operations, their composition, and their application by every path."""

import numpy as np
import pytest

from semiseg_jax.data import sda_tables

LEVELS = np.arange(256)
# In the last, pairs of levels are looked up at once; its number of values is odd for RGB.
SIZES = [(1, 1), (1, 7), (7, 1), (4, 1), (33, 20), (211, 317)]
SHIFTS = [0.0, 13.0, -20.0, 127.0, 200.0, -128.0]


def rounded(levels):
    return np.floor(np.asarray(levels, np.float64) + 0.5).clip(0, 255).astype(np.uint8)


def column(*values):
    return np.array(values, np.float32).astype(np.float64)[:, None]


def test_tables_hold_the_laws_of_all_levels():
    """Each law, computed for the 256 levels; magnitudes are float32."""
    values = np.array([0.5, 1.37, 2.0], np.float32)
    wide = column(*values)
    shifts = np.array([-20.5, 13.3, 300], np.float32)
    expected = {
        "contrast_gamma": rounded(255 * (LEVELS / 255) ** wide),
        "contrast_linear": rounded(127 + wide * (LEVELS - 127)),
        "multiply": rounded(wide * LEVELS),
        "brightness": rounded(LEVELS + column(*shifts)),
    }
    for name, table in expected.items():
        magnitude = shifts if name == "brightness" else values
        np.testing.assert_array_equal(getattr(sda_tables, name)(magnitude), table, err_msg=name)
    solarized = sda_tables.solarize(np.array(100.5, np.float32))
    np.testing.assert_array_equal(solarized, [[x if x < 101 else 255 - x for x in range(256)]])
    inverted = sda_tables.invert(np.array([True, False]))
    np.testing.assert_array_equal(inverted, [255 - LEVELS, LEVELS])


def tables(rows):
    """Returns tables of every form that `look_up` tells apart, and neighbours of these forms."""
    rng = np.random.default_rng(rows)
    almost = sda_tables.brightness(np.full(rows, 13.0, np.float32))
    almost[-1, 77] ^= 1
    nearly_inverted = sda_tables.solarize(np.array(77.0))
    nearly_inverted[0, 200] = 200
    return [
        rng.integers(0, 256, (rows, 256)).astype(np.uint8),
        sda_tables.invert(np.arange(rows) % 2 == 0),
        sda_tables.solarize(np.where(np.arange(rows) % 2, 256, 90.0 + np.arange(rows))),
        *(sda_tables.brightness(np.full(rows, v)) for v in SHIFTS),
        sda_tables.brightness(np.linspace(-20, 50, rows)),
        almost,
        nearly_inverted,
    ]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_look_up_equals_indexing(channels):
    rng = np.random.default_rng(0)
    for size in SIZES:
        image = rng.integers(0, 256, (*size, channels)).astype(np.uint8)
        before = image.copy()
        for table in (*tables(1), *tables(channels)):
            of_channels = np.broadcast_to(table, (channels, 256))
            expected = np.stack([of_channels[c][image[..., c]] for c in range(channels)], axis=-1)
            result = sda_tables.look_up(image, table)
            np.testing.assert_array_equal(result, expected)
            assert result.dtype == np.uint8 and not np.shares_memory(result, image)
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(("first_rows", "second_rows"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_composed_tables_apply_both(first_rows, second_rows):
    image = np.random.default_rng(1).integers(0, 256, (20, 31, 3)).astype(np.uint8)
    for first, second in zip(tables(first_rows), reversed(tables(second_rows)), strict=True):
        expected = sda_tables.look_up(sda_tables.look_up(image, first), second)
        composed = sda_tables.compose(first, second)
        np.testing.assert_array_equal(sda_tables.look_up(image, composed), expected)


def test_empty_like_is_aligned():
    image = np.zeros((7, 5, 3), np.uint8)
    for _ in range(20):
        empty = sda_tables.empty_like(image)
        assert (empty.shape, empty.dtype) == (image.shape, image.dtype)
        assert empty.ctypes.data % 64 == 0
