"""Tiles of an image that is too large for one pass of the network."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Shaped, UInt8

from semiseg_jax.inference import window_starts
from semiseg_jax.shape_buckets import ShapeBuckets

# Neighbouring tiles overlap by 1 / _OVERLAP_FRACTION of their side.
_OVERLAP_FRACTION = 4


@dataclasses.dataclass(frozen=True)
class Tile1D:
    """A tile along one axis; all values are pixels of the image.

    Attributes:
        start: first pixel of the tile.
        low, high: the result of the tile is used for the pixels low … high - 1.
    """

    start: int
    low: int
    high: int


def tile_axis(size: int, tile: int) -> list[Tile1D]:
    """Returns the tiles of an axis; of each overlap, either tile provides the nearer half.

    Args:
        size: length of the axis in pixels.
        tile: length of a tile in pixels.
    """
    starts = window_starts(size, tile, tile - tile // _OVERLAP_FRACTION)
    boundaries = [(first + tile + second) // 2 for first, second in itertools.pairwise(starts)]
    spans = zip(starts, [0, *boundaries], [*boundaries, size], strict=True)
    return [Tile1D(*span) for span in spans]


@dataclasses.dataclass(frozen=True)
class TileBatch:
    """A batch of tiles of one image; a batch that is not full ends with empty tiles.

    Attributes:
        images: RGB of the tiles, padded.
        tiles: (vertical, horizontal) position of each tile that is not empty.
        is_last: whether the other tiles of the image are in earlier batches.
    """

    images: UInt8[np.ndarray, "n th tw 3"]
    tiles: Sequence[tuple[Tile1D, ...]]
    is_last: bool


def tile_batches(
    image: UInt8[np.ndarray, "h w 3"], buckets: ShapeBuckets, pad_value: UInt8[np.ndarray, "3"]
) -> Iterator[TileBatch]:
    """Yields the tiles of an image.

    Args:
        image: RGB.
        buckets: the sizes of tiles and batches.
        pad_value: RGB of the padding.
    """
    size = image.shape[:2]
    tile_size = buckets.tile_size(size)
    padded_size = buckets.padded_size(tile_size)
    batch_size = buckets.batch_size(padded_size)
    tiles = list(itertools.product(*map(tile_axis, size, tile_size)))
    for first in range(0, len(tiles), batch_size):
        members = tiles[first : first + batch_size]
        pixels = np.empty((batch_size, *padded_size, 3), np.uint8)
        pixels[:] = pad_value
        for i, (down, across) in enumerate(members):
            rows = slice(down.start, down.start + tile_size[0])
            columns = slice(across.start, across.start + tile_size[1])
            pixels[i, : tile_size[0], : tile_size[1]] = image[rows, columns]
        yield TileBatch(pixels, members, is_last=first + batch_size >= len(tiles))


def paste(
    batch: TileBatch,
    values: Shaped[np.ndarray, "n th tw *rest"],
    target: Shaped[np.ndarray, "h w *rest"],
) -> None:
    """Copies the middle of each tile to its place in the image.

    Args:
        batch: the tiles.
        values: their results.
        target: the result of the image; written to.
    """
    for (down, across), value in zip(batch.tiles, values, strict=False):
        target[down.low : down.high, across.low : across.high] = value[
            down.low - down.start : down.high - down.start,
            across.low - across.start : across.high - across.start,
        ]
