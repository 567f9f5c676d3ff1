"""The point operations of strong data augmentation as look-up tables, and their application.

A point operation maps each value by itself. Its table holds the result of each of the 256 levels,
uint8 [C, 256] for C channels or [1, 256] for the same in all channels. The results are rounded half
up and clipped to 0..255, so that a run of point operations is exactly one table: see `compose`.

Images have any number of channels. Images of 16 bits would take tables of 65536 levels.
"""

from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float64, Int, UInt8, UInt16

Image: TypeAlias = UInt8[np.ndarray, "h w c"]
Table: TypeAlias = UInt8[np.ndarray, "rows 256"]

_LEVELS = np.arange(256)


# --- Tables --------------------------------------------------------------------------------------


def contrast_gamma(g: Float[np.ndarray, " c"]) -> Table:
    """255 * (x / 255)^g."""
    return _rounded(255 * (_LEVELS / 255) ** _column(g))


def contrast_linear(a: Float[np.ndarray, " c"]) -> Table:
    """127 + a * (x - 127)."""
    return _rounded(127 + _column(a) * (_LEVELS - 127))


def multiply(m: Float[np.ndarray, " c"]) -> Table:
    """x * m."""
    return _rounded(_column(m) * _LEVELS)


def brightness(v: Float[np.ndarray, "*channels"]) -> Table:
    """x + v, v [] for all channels or [C], one per channel."""
    return _rounded(_column(v) + _LEVELS)


def invert(channels: Bool[np.ndarray, " c"]) -> Table:
    """255 - x in the channels that are True."""
    return np.where(np.reshape(channels, (-1, 1)), 255 - _LEVELS, _LEVELS).astype(np.uint8)


def solarize(t: Float[np.ndarray, "*channels"]) -> Table:
    """255 - x where x >= t (as in PIL), t [] for all channels or [C]."""
    return np.where(_column(t) <= _LEVELS, 255 - _LEVELS, _LEVELS).astype(np.uint8)


def equalize(histogram: Int[np.ndarray, "c 256"]) -> Table:
    """Equalises the histogram of each channel, exactly as PIL's ImageOps.equalize.

    As in PIL, pixels of the highest occurring level do not count towards the step. A step of 0
    leaves the channel unchanged: it has one level, or fewer than 255 pixels below the highest.
    """
    last = 255 - np.argmax(histogram[:, ::-1] > 0, axis=1)[:, None]
    total = histogram.sum(axis=1, keepdims=True)
    step = (total - np.take_along_axis(histogram, last, axis=1)) // 255
    below = np.cumsum(histogram, axis=1) - histogram
    equalized = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    return np.where(step > 0, equalized, _LEVELS).astype(np.uint8)


def compose(
    first: Table, second: UInt8[np.ndarray, "second_rows 256"]
) -> UInt8[np.ndarray, "composed_rows 256"]:
    """Returns the table of `first`, then `second`; either may hold for all channels."""
    channels = max(len(first), len(second))
    second = np.broadcast_to(second, (channels, 256))
    return np.take_along_axis(second, np.broadcast_to(first, (channels, 256)).astype(np.intp), 1)


def _column(value: Float[np.ndarray, "*channels"]) -> Float64[np.ndarray, "rows 1"]:
    return np.reshape(np.asarray(value, np.float64), (-1, 1))


def _rounded(levels: Float64[np.ndarray, "rows 256"]) -> Table:
    return np.clip(np.floor(levels + 0.5), 0, 255).astype(np.uint8)


# --- Application ---------------------------------------------------------------------------------


def look_up(image: Image, table: Table) -> Image:
    """Returns the image with each value replaced by its entry in the table of its channel.

    A look-up takes as long for 16 bits as for 8, so two values are looked up at once. Arithmetic on
    vectors of values is faster still for the two forms of table that it can compute: those that
    invert the levels from a threshold on, and those that add one constant.
    """
    image = np.ascontiguousarray(image)
    thresholds = _inverted_from(table)
    if thresholds is not None:
        return _invert_from(image, thresholds)
    shift = _shift(table)
    if shift is not None:
        return _add(image, shift)
    # Below this size, building the tables of pairs takes longer than it saves.
    if image.size < 65536 * _num_pair_tables(table):
        return _look_up_values(image, table)
    return _look_up_pairs(image, table)


def _look_up_values(image: Image, table: Table) -> Image:
    result = empty_like(image)
    if len(table) == 1:
        cv2.LUT(_rows(image), table[0], dst=_rows(result))
    else:
        cv2.LUT(image, np.ascontiguousarray(table.T)[None], dst=result)
    return result


def _num_pair_tables(table: Table) -> int:
    """Returns after how many pairs of neighbours the channels of the pairs repeat."""
    channels = len(table)  # 1 if the channels do not differ
    return channels if channels % 2 else channels // 2


def _look_up_pairs(image: Image, table: Table) -> Image:
    """Looks up pairs of neighbours of the flat image, for RGB (R, G), (B, R), (G, B), (R, G), …"""
    num_tables = _num_pair_tables(table)
    values = image.reshape(-1)
    result = empty_like(image)
    end = image.size // (2 * num_tables) * (2 * num_tables)
    cv2.LUT(
        values[:end].view(np.uint16).reshape(1, -1, num_tables),
        _pair_tables(table, num_tables),
        dst=result.reshape(-1)[:end].view(np.uint16).reshape(1, -1, num_tables),
    )
    rest = np.arange(image.size - end) % len(table)
    result.reshape(-1)[end:] = table[rest, values[end:]]
    return result


def _pair_tables(table: Table, num_tables: int) -> UInt16[np.ndarray, "1 65536 tables"]:
    """Returns the result for each pair of levels, the first in the lower byte."""
    channels = 2 * np.arange(num_tables) % len(table)
    first = table[channels].astype(np.uint16)
    second = table[(channels + 1) % len(table)].astype(np.uint16) << 8
    pairs = [np.bitwise_or.outer(high, low) for low, high in zip(first, second, strict=True)]
    return cv2.merge(pairs).reshape(1, 65536, num_tables)


def empty_like(image: np.ndarray) -> np.ndarray:
    """Returns an uninitialised array of the shape and type of an image.

    Its memory begins at a multiple of 64 bytes. TensorFlow takes such memory over from a Python
    function, and copies any other.
    """
    memory = np.empty(image.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + image.nbytes].view(image.dtype).reshape(image.shape)


def _inverted_from(table: Table) -> Sequence[int] | None:
    """Returns t of each channel if the table is 255 - x where x >= t, else x; otherwise None."""
    flips = table ^ _LEVELS.astype(np.uint8)
    counts = np.count_nonzero(flips, axis=1)
    thresholds = 256 - counts
    expected = np.where(thresholds[:, None] <= _LEVELS, 255, 0)
    return thresholds.tolist() if np.array_equal(flips, expected) else None


def _invert_from(image: Image, thresholds: Sequence[int]) -> Image:
    result = empty_like(image)
    if set(thresholds) <= {0, 256}:  # whole channels
        flips = _row([255 if t == 0 else 0 for t in thresholds], image)
        np.bitwise_xor(_rows(image), flips, out=_rows(result))
        return result
    # 256, for no level, has no place in uint8: a channel with this threshold inverts no value.
    limits = _row([min(t, 255) for t in thresholds], image)
    flips = _rows(result)
    np.greater_equal(_rows(image), limits, out=flips.view(bool))
    np.negative(flips, out=flips)  # 1 becomes 255
    if 256 in thresholds:
        flips &= _row([0 if t == 256 else 255 for t in thresholds], image)
    np.bitwise_xor(_rows(image), flips, out=flips)
    return result


def _shift(table: Table) -> int | None:
    """Returns v if the table is x + v, clipped, in all channels; otherwise None."""
    # Level 128 is not clipped if -128 <= v <= 127. Larger shifts are looked up.
    shift = int(table[0, 128]) - 128
    expected = np.clip(_LEVELS + shift, 0, 255)
    return shift if (table == expected).all() else None


def _add(image: Image, shift: int) -> Image:
    result = empty_like(image)
    # Limited so that the sum is in 0..255. The limit is a row, because NumPy's minimum and maximum
    # take ten times as long with a scalar. The wrap-around of uint8 implements negative shifts.
    limit, limited = (255 - shift, np.minimum) if shift >= 0 else (-shift, np.maximum)
    limits = _row([limit], image)
    limited(_rows(image), limits, out=_rows(result))
    np.add(result, np.uint8(shift % 256), out=result)
    return result


def _rows(image: Image) -> UInt8[np.ndarray, "h wc"]:
    return image.reshape(len(image), -1)


def _row(values: Sequence[int], image: Image) -> UInt8[np.ndarray, " wc"]:
    """Returns a value of each channel, or one of all, as a row of the image."""
    channels = image.shape[2]
    return np.tile(np.broadcast_to(np.array(values, np.uint8), channels), image.shape[1])
