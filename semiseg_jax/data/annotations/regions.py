"""Areas of annotation files, drawn as pixels, and areas of pixels traced as polygons.

Coordinates are (x, y) in pixels: the pixel of column c and row r covers c to c + 1 and r to r + 1,
as COCO, LabelMe and CVAT have them. One rule draws all areas: a pixel belongs to an area that has
its centre (c + 0.5, r + 0.5). Of two areas with a common edge, exactly one has each pixel on it.
"""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

Points = Float[np.ndarray, "_ 2"]

# So many edges of a polygon are drawn at a time, which bounds the memory.
_EDGES_PER_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Patch:
    """A part of an image with the pixels of an area; the area has no pixels outside of it.

    Attributes:
        top, left: row and column of its first pixel.
        pixels: whether each pixel belongs to the area.
    """

    top: int
    left: int
    pixels: Bool[np.ndarray, "h w"]

    @property
    def window(self) -> tuple[slice, slice]:
        """The rows and columns of the image that the patch covers."""
        height, width = self.pixels.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


class Region(abc.ABC):
    """An area of an image."""

    @abc.abstractmethod
    def bounds(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Returns (smallest x, smallest y, largest x, largest y) in an image of (height, width)."""

    @abc.abstractmethod
    def draw(self, size: tuple[int, int]) -> Patch:
        """Returns the pixels of the area inside an image of (height, width)."""


@dataclasses.dataclass(frozen=True)
class Polygons(Region):
    """The union of polygons; a polygon that crosses itself has the areas of odd winding.

    Attributes:
        parts: the vertices of each polygon.
        is_relative: vertices are shares of width and height, not pixels.
    """

    parts: tuple[Points, ...]
    is_relative: bool = False

    def bounds(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """As `Region.bounds`."""
        points = np.concatenate(self._in_pixels(size))
        return _bounds(points)

    def draw(self, size: tuple[int, int]) -> Patch:
        """As `Region.draw`."""
        return union([fill(points, size) for points in self._in_pixels(size)])

    def _in_pixels(self, size: tuple[int, int]) -> list[Points]:
        scale = np.array(size[::-1], float) if self.is_relative else np.ones(2)
        return [points * scale for points in self.parts]


@dataclasses.dataclass(frozen=True)
class Ellipse(Region):
    """An ellipse.

    Attributes:
        center: (x, y).
        radii: along its own axes, in pixels.
        angle: from the x axis to its first axis, clockwise as seen, in degrees.
    """

    center: tuple[float, float]
    radii: tuple[float, float]
    angle: float = 0.0

    def bounds(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """As `Region.bounds`."""
        cos, sin = _cos_sin(self.angle)
        half_width = np.hypot(self.radii[0] * cos, self.radii[1] * sin)
        half_height = np.hypot(self.radii[0] * sin, self.radii[1] * cos)
        x, y = self.center
        return x - half_width, y - half_height, x + half_width, y + half_height

    def draw(self, size: tuple[int, int]) -> Patch:
        """As `Region.draw`."""
        if min(self.radii) <= 0:
            return Patch(0, 0, np.zeros((0, 0), bool))
        top, left, x, y = _centers(self.bounds(size), size)
        cos, sin = _cos_sin(self.angle)
        dx, dy = x - self.center[0], y - self.center[1]
        along = (dx * cos + dy * sin) / self.radii[0]
        across = (dy * cos - dx * sin) / self.radii[1]
        return Patch(top, left, along**2 + across**2 <= 1)


@dataclasses.dataclass(frozen=True)
class Stroke(Region):
    """A line of a width, with round ends; of a single point, a disc.

    Attributes:
        points: the vertices of the line.
        width: in pixels.
    """

    points: Points
    width: float = 0.0

    def bounds(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """As `Region.bounds`."""
        left, top, right, bottom = _bounds(self.points)
        half = self.width / 2
        return left - half, top - half, right + half, bottom + half

    def draw(self, size: tuple[int, int]) -> Patch:
        """As `Region.draw`."""
        starts = self.points[:-1] if len(self.points) > 1 else self.points
        ends = self.points[1:] if len(self.points) > 1 else self.points
        return union([self._segment(*ends_, size) for ends_ in zip(starts, ends, strict=True)])

    def _segment(
        self, start: Float[np.ndarray, "2"], end: Float[np.ndarray, "2"], size: tuple[int, int]
    ) -> Patch:
        piece = dataclasses.replace(self, points=np.stack([start, end]))
        top, left, x, y = _centers(piece.bounds(size), size)
        direction = end - start
        squared = float(direction @ direction)
        share = np.zeros(())
        if squared:
            share = ((x - start[0]) * direction[0] + (y - start[1]) * direction[1]) / squared
        share = np.clip(share, 0, 1)
        dx, dy = x - start[0] - share * direction[0], y - start[1] - share * direction[1]
        return Patch(top, left, dx**2 + dy**2 <= self.width**2 / 4)


@dataclasses.dataclass(frozen=True)
class Bitmap(Region):
    """An area of pixels.

    Attributes:
        top, left: row and column of the first pixel, which may be outside of the image.
        runs: lengths of runs of pixels that are outside and inside in turn, outside first.
        shape: (height, width) that the runs fill.
        by_column: whether the runs go down the columns, as in COCO, or along the rows.
    """

    top: int
    left: int
    runs: Int[np.ndarray, " runs"]
    shape: tuple[int, int]
    by_column: bool = False

    def bounds(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """As `Region.bounds`."""
        height, width = self.shape
        return self.left, self.top, self.left + width, self.top + height

    def draw(self, size: tuple[int, int]) -> Patch:
        """As `Region.draw`."""
        pixels = np.repeat(np.arange(len(self.runs)) % 2 == 1, self.runs)
        pixels = pixels.reshape(self.shape, order="F" if self.by_column else "C")
        first = max(-self.top, 0), max(-self.left, 0)
        top, left = max(self.top, 0), max(self.left, 0)
        end = size[0] - self.top, size[1] - self.left
        return Patch(top, left, pixels[first[0] : max(end[0], 0), first[1] : max(end[1], 0)])


def runs_of(pixels: Bool[np.ndarray, "h w"]) -> Int[np.ndarray, " runs"]:
    """Returns the runs along the rows of pixels, as `Bitmap` has them."""
    flat = np.concatenate([[False], pixels.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [pixels.size]]))


def rectangle(left: float, top: float, right: float, bottom: float, angle: float = 0.0) -> Polygons:
    """Returns a rectangle, turned about its centre by an angle, clockwise as seen, in degrees."""
    center = np.array([left + right, top + bottom]) / 2
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], float) - center
    cos, sin = _cos_sin(angle)
    return Polygons((corners @ np.array([[cos, sin], [-sin, cos]]) + center,))


def fill(points: Points, size: tuple[int, int]) -> Patch:
    """Draws a polygon; where it crosses itself, pixels of odd winding belong to it.

    Args:
        points: its vertices; the last one is joined to the first.
        size: (height, width) of the image, which may be anywhere.
    """
    top, left, height, width = _window(_bounds(points), size)
    # A pixel is inside if an odd number of edges crosses its row to the left of its centre.
    crossings = np.zeros((height, width + 1), np.uint8)
    starts, ends = points, np.roll(points, -1, axis=0)
    # Each edge upwards, so that two polygons have the same crossings on a common edge.
    swap = (starts[:, 1] > ends[:, 1])[:, None]
    starts, ends = np.where(swap, ends, starts), np.where(swap, starts, ends)
    first_rows = np.clip(np.ceil(starts[:, 1] - 0.5) - top, 0, height).astype(np.int64)
    end_rows = np.clip(np.ceil(ends[:, 1] - 0.5) - top, 0, height).astype(np.int64)
    for chunk in range(0, len(points), _EDGES_PER_CHUNK):
        edges = np.arange(chunk, min(chunk + _EDGES_PER_CHUNK, len(points)))
        counts = end_rows[edges] - first_rows[edges]
        edge = np.repeat(edges, counts)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
        row = row + first_rows[edge]
        (x0, y0), (x1, y1) = starts[edge].T, ends[edge].T
        x = x0 + (row + (top + 0.5) - y0) * ((x1 - x0) / (y1 - y0))
        column = np.clip(np.ceil(x - 0.5) - left, 0, width).astype(np.int64)
        np.bitwise_xor.at(crossings, (row, column), 1)
    inside = np.bitwise_xor.accumulate(crossings, axis=1)[:, :width]
    return Patch(top, left, inside.astype(bool))


def union(patches: Sequence[Patch]) -> Patch:
    """Returns the union of patches; there is at least one."""
    if len(patches) == 1:
        return patches[0]
    rows, columns = zip(*(patch.window for patch in patches), strict=True)
    top, left = min(r.start for r in rows), min(c.start for c in columns)
    size = max(r.stop for r in rows) - top, max(c.stop for c in columns) - left
    pixels = np.zeros(size, bool)
    for patch, row, column in zip(patches, rows, columns, strict=True):
        pixels[row.start - top : row.stop - top, column.start - left : column.stop - left] |= (
            patch.pixels
        )
    return Patch(top, left, pixels)


# Steps to the right, down, to the left and up, as seen: each is a right turn from the one before.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def trace(pixels: Bool[np.ndarray, "h w"]) -> list[Int[np.ndarray, "_ 2"]]:
    """Returns the rings around the pixels of an area, along the edges of its pixels.

    A pixel is in the area if and only if it is in an odd number of the rings, as `fill` draws them.
    Contours through the centres of pixels would shrink an area by half a pixel on each side.

    Args:
        pixels: an area; pixels that touch at a corner alone have rings of their own.

    Returns:
        The vertices (x, y) of each ring, at corners of pixels and a pixel apart. Outer rings run
        clockwise as seen, those around holes anticlockwise.
    """
    padded = np.pad(pixels, 1)
    inside = padded[1:-1, 1:-1]
    # The steps that begin at (x, y), with the area on the right. A dict keeps their order.
    steps: dict[tuple[int, int, int], None] = {}
    for direction, (outside, dx, dy) in enumerate(
        (
            (padded[:-2, 1:-1], 0, 0),
            (padded[1:-1, 2:], 1, 0),
            (padded[2:, 1:-1], 1, 1),
            (padded[1:-1, :-2], 0, 1),
        )
    ):
        rows, columns = np.nonzero(inside & ~outside)
        for x, y in zip(columns.tolist(), rows.tolist(), strict=True):
            steps[x + dx, y + dy, direction] = None
    rings = []
    while steps:
        rings.append(np.array(_follow(steps, next(iter(steps)))))
    return rings


def _follow(
    steps: dict[tuple[int, int, int], None], first: tuple[int, int, int]
) -> list[tuple[int, int]]:
    """Removes the steps of the ring that begins with a step; returns the ring's vertices."""
    ring: list[tuple[int, int]] = []
    step = first
    while True:
        x, y, direction = step
        ring.append((x, y))
        del steps[step]
        x, y = x + _STEPS[direction][0], y + _STEPS[direction][1]
        # The right turn first: where pixels touch at a corner, the ring stays at its pixel.
        for turn in (1, 0, 3):
            step = x, y, (direction + turn) % 4
            if step == first:
                return ring
            if step in steps:
                break


def signed_area(ring: Float[np.ndarray, "n 2"] | Int[np.ndarray, "n 2"]) -> float:
    """Returns the area of a ring in pixels; negative if it runs anticlockwise as seen."""
    x, y = ring.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def corners(ring: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "m 2"]:
    """Returns a ring without the vertices at which it goes straight on."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    is_straight = (cross == 0) & ((before * after).sum(axis=1) > 0)
    return ring[~is_straight]


def join_holes(
    outer: Int[np.ndarray, "n 2"], holes: Sequence[Int[np.ndarray, "_ 2"]]
) -> Int[np.ndarray, "k 2"]:
    """Returns one ring around an area with holes: each hole is joined by a cut of no width.

    A cut is a line that the ring passes in both directions, so that `fill` and the tools, whether
    they count crossings or windings, draw the area without its holes.

    Args:
        outer: the ring around the area, from `trace`.
        holes: the rings around its holes, from `trace`.
    """
    ring = outer
    # From left to right, so that the pixels to the left of a hole end at what is joined already.
    for hole in sorted(holes, key=lambda hole: hole[:, 0].min()):
        start = np.lexsort((hole[:, 1], hole[:, 0]))[0]
        x, y = hole[start]
        on_row = np.flatnonzero((ring[:, 1] == y) & (ring[:, 0] <= x))
        joint = on_row[np.argmax(ring[on_row, 0])]
        hole = np.roll(hole, -start, axis=0)
        parts = (ring[: joint + 1], hole, hole[:1], ring[joint:])
        ring = np.concatenate(parts)
    return ring


def _bounds(points: Points) -> tuple[float, float, float, float]:
    left, top = points.min(axis=0)
    right, bottom = points.max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def _window(
    bounds: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Returns (top, left, height, width) of the pixels of an image with a centre within bounds."""
    left, right = (int(np.clip(np.ceil(bounds[i] - 0.5), 0, size[1])) for i in (0, 2))
    top, bottom = (int(np.clip(np.ceil(bounds[i] - 0.5), 0, size[0])) for i in (1, 3))
    return top, left, bottom - top, right - left


def _centers(
    bounds: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[int, int, Float[np.ndarray, "1 w"], Float[np.ndarray, "h 1"]]:
    """Returns (top, left, x, y) of the window of an area with curves; x and y of the centres."""
    left, top, right, bottom = bounds
    # A pixel more, because the edge of a disc belongs to it.
    top, left, height, width = _window((left, top, right + 1, bottom + 1), size)
    x, y = np.arange(left, left + width) + 0.5, np.arange(top, top + height) + 0.5
    return top, left, x[None, :], y[:, None]


def _cos_sin(degrees: float) -> tuple[float, float]:
    angle = np.deg2rad(degrees)
    return float(np.cos(angle)), float(np.sin(angle))
