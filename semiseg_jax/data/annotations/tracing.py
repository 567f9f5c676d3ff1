"""The objects of a label map: connected pixels of a class, as polygons with holes."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from scipy import ndimage

from semiseg_jax.data.annotations import regions


@dataclasses.dataclass(frozen=True)
class TracedObject:
    """Connected pixels of one class.

    Attributes:
        value: mask value of its pixels.
        outer: the ring around it, its corners (x, y).
        holes: the rings around its holes.
        area: its pixels, without the holes.
        filled_area: its pixels and those of its holes.
        box: (x, y, width, height) of the pixels.
        joined: one ring around the object without its holes, see `regions.join_holes`.
    """

    value: int
    outer: Int[np.ndarray, "_ 2"]
    holes: tuple[Int[np.ndarray, "_ 2"], ...]
    area: int
    filled_area: int
    box: tuple[int, int, int, int]
    joined: Int[np.ndarray, "_ 2"]


def objects_of(
    label_map: UInt8[np.ndarray, "h w"], left_out: Collection[int], min_area: int = 0
) -> tuple[list[TracedObject], int]:
    """Returns the objects of a label map, and the number of those that are too small.

    Pixels that touch at a corner alone are not connected. An object comes before those in its
    holes.

    Args:
        label_map: class ids and IGNORE.
        left_out: values that are no objects, such as the background.
        min_area: the fewest pixels of an object.
    """
    objects: list[TracedObject] = []
    too_small = 0
    for value in np.unique(label_map).tolist():
        if value in left_out:
            continue
        components, _ = ndimage.label(label_map == value)
        for number, window in enumerate(ndimage.find_objects(components), 1):
            pixels = components[window] == number
            if pixels.sum() < min_area:
                too_small += 1
            else:
                objects.append(_trace(value, pixels, window))
    return sorted(objects, key=lambda o: -o.filled_area), too_small


def _trace(value: int, pixels: Any, window: Sequence[slice]) -> TracedObject:
    """Returns the object of connected pixels.

    Args:
        value: their mask value.
        pixels: bool [h, w].
        window: the rows and the columns of the image that these are.
    """
    rows, columns = window
    offset = np.array([columns.start, rows.start])
    rings = [ring + offset for ring in regions.trace(pixels)]
    areas = [round(regions.signed_area(ring)) for ring in rings]
    # Connected pixels have one ring around them, the others are around holes.
    outer = rings[int(np.argmax(areas))]
    holes = [ring for ring, area in zip(rings, areas, strict=True) if area < 0]
    return TracedObject(
        value,
        regions.corners(outer),
        tuple(map(regions.corners, holes)),
        int(pixels.sum()),
        max(areas),
        (columns.start, rows.start, pixels.shape[1], pixels.shape[0]),
        regions.corners(regions.join_holes(outer, holes)),
    )
