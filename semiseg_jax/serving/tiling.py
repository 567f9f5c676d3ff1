"""Tiles along one axis of an image that is too large for one pass of the network."""

import dataclasses
import itertools

from semiseg_jax.inference import window_starts

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
