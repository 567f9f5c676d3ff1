"""Guided cutout: cuts a rectangle out of the box of each predicted object (CCT).

Source: Ouali et al., CVPR 2020, section 3.3, "Guided Cutout (G-Cutout)"; yassouali/CCT,
models/decoders.py, `guided_cutout`. The published code finds objects on the host: the outermost
contours of OpenCV's `findContours`, without those of at most 50 points, where a straight line,
horizontal, vertical or diagonal, has its two ends alone (CHAIN_APPROX_SIMPLE). The functions here
find the same objects on the device, and tests compare the boxes with OpenCV's:

- The outermost contours are the components of the mask with its holes filled, where pixels that
  touch at a corner are connected. Objects inside the hole of another have no contour of their own.
- The contour visits a pixel once for each run of background around it that touches one of its four
  sides. It arrives from the neighbour at one end of the run and leaves to the neighbour at the
  other end. The visit is a point of the contour unless the two are opposite each other.

Measured with OpenCV 5.0: the boxes are equal on 25 label maps of CamVid (240x180, with the most
frequent class as the background, at most 2 objects) and on random masks of 320x320 (at most 66).

Two things differ from the published code. Shapes are static, so that an image has at most
`max_objects` objects; of more, those with the longest contours stay. And the corner of a rectangle
is drawn by a key for each image, from the same distribution.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from semiseg_jax.methods import connected_components

# Neighbours of a pixel as (row, column), clockwise from the one above; the sides have even numbers.
RING = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


@flax.struct.dataclass
class ObjectBoxes:
    """The boxes of the objects in each image, in pixels; each attribute is an array [n, k].

    Attributes:
        exists: whether there is a k-th object, bool; the others are 0 where there is none.
        top, left: first row and column of the object, int32.
        height, width: last row minus first row, and likewise for columns, int32: one less than the
            pixels that the object spans, as in the published code.
    """

    exists: Any
    top: Any
    left: Any
    height: Any
    width: Any


def find_objects(
    mask: Bool[Array, "n h w"], min_points: Integer[ArrayLike, ""] = 51, max_objects: int = 128
) -> ObjectBoxes:
    """Returns the boxes of the objects in each mask, by falling number of contour points.

    Call it once and `keep_mask` for each decoder.

    Args:
        mask: the pixels of objects, for example `masks.predicted_objects`.
        min_points: points that a contour must have.
        max_objects: objects of an image, at most.
    """
    mask = connected_components.fill_holes(jax.lax.stop_gradient(mask))
    labels = connected_components.label_components(mask)
    points = contour_points(mask)
    return _largest_boxes(labels, points, min_points, max_objects)


def _largest_boxes(
    labels: Int[Array, "n h w"],
    points: Int[Array, "n h w"],
    min_points: Integer[ArrayLike, ""],
    max_objects: int,
) -> ObjectBoxes:
    """The boxes from the labels of the components and the contour points at the pixels.

    It sorts the pixels by component, so that sums over a component are differences of cumulative
    sums. Scatter, gather and `top_k` would move images between the devices of a mesh.
    """
    batch, height, width = labels.shape
    size = height * width
    index = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (batch, size))
    label, index, points = jax.lax.sort(
        (labels.reshape(batch, size), index, points.reshape(batch, size)), dimension=1, num_keys=2
    )
    last = jnp.pad(label[:, 1:] != label[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    first = jnp.roll(last, 1, axis=1)
    total = jnp.cumsum(points, axis=1, dtype=jnp.int32)
    num_points = total - jax.lax.cummax(jnp.where(first, total - points, 0), axis=1)
    # The start grows with each component, so that a cumulative maximum begins anew there. An image
    # has at most one component for four pixels: int32 suffices for 2048 x 2048.
    start = width * jnp.cumsum(first, axis=1, dtype=jnp.int32)
    row, column = index // width, index % width
    right = jax.lax.cummax(start + column, axis=1) - start
    left = width - 1 - (jax.lax.cummax(start + width - 1 - column, axis=1) - start)
    # At its last pixel all of a component is known. The background has the label h * w.
    num_points = jnp.where(last & (label < size), num_points, 0)
    columns = jax.lax.sort((-num_points, label // width, left, row, right), dimension=1, num_keys=1)
    negative, top, left, bottom, right = (column[:, :max_objects] for column in columns)
    exists = -negative >= min_points
    return ObjectBoxes(
        exists,
        top=jnp.where(exists, top, 0),
        left=jnp.where(exists, left, 0),
        height=jnp.where(exists, bottom - top, 0),
        width=jnp.where(exists, right - left, 0),
    )


def contour_points(mask: Bool[Array, "n h w"]) -> Int[Array, "n h w"]:
    """Counts the contour points at each pixel of masks without holes; int32, 0 to 4.

    Their sum over a component is the length of its contour in OpenCV, with CHAIN_APPROX_SIMPLE.
    """
    padded = jnp.pad(mask, ((0, 0), (1, 1), (1, 1)))
    height, width = mask.shape[1:]
    ring = [padded[:, 1 + i : 1 + i + height, 1 + j : 1 + j + width] for i, j in RING]
    points = jnp.zeros(mask.shape, jnp.int32)
    for first in range(8):
        # The run of background starts behind the neighbour `first` and has `length` pixels.
        run = ring[first]
        for length in range(1, 8):
            run = run & ~ring[(first + length) % 8]
            touches_a_side = length > 1 or first % 2 == 1
            # The two ends are opposite each other where three pixels lie between them.
            if touches_a_side and length != 3:
                points += run & ring[(first + length + 1) % 8]
    alone = ~jnp.any(jnp.stack(ring), axis=0)
    return jnp.where(mask, points + alone, 0)


def keep_mask(
    keys: Key[Array, " n"],
    boxes: ObjectBoxes,
    size: tuple[int, int],
    erase: float = 0.4,
) -> Bool[Array, "n h w"]:
    """Draws one rectangle inside the box of each object and returns what is outside all of them.

    Args:
        keys: one for each image, from `image_keys`.
        boxes: from `find_objects`.
        size: (height, width) of the masks that the boxes are of.
        erase: side of the rectangle as a share of the side of the box, rounded down to pixels.
    """
    slots = boxes.exists.shape[1]
    draws = jax.vmap(lambda key: jax.random.uniform(key, (2, slots), jnp.float32))(keys)
    rows = _in_interval(boxes.top, boxes.height, size[0], draws[:, 0], erase)
    columns = _in_interval(boxes.left, boxes.width, size[1], draws[:, 1], erase)
    rows = rows & boxes.exists[..., None]
    # A product of matrices: how many rectangles cover each pixel. Small integers are exact.
    covers = jnp.einsum("bkh,bkw->bhw", rows.astype(jnp.bfloat16), columns.astype(jnp.bfloat16))
    return covers == 0


def _in_interval(
    start: Int[Array, "n k"],
    extent: Int[Array, "n k"],
    size: int,
    draws: Float[Array, "n k"],
    erase: float,
) -> Bool[Array, "n k size"]:
    """Whether each row, or column, is inside the interval that is drawn for each object."""
    # Tables instead of products: float32 would round .6 * 35 down to 20. As in the published code,
    # the products are in float64.
    lengths = np.array([int(side * erase) for side in range(size)], np.int32)
    offsets = np.array([int(side * (1 - erase)) for side in range(size)], np.int32)
    length, offset = jnp.asarray(lengths)[extent], jnp.asarray(offsets)[extent]
    first = start + jnp.minimum((draws * (offset + 1)).astype(jnp.int32), offset)
    position = jnp.arange(size, dtype=jnp.int32)
    return (position >= first[..., None]) & (position < (first + length)[..., None])
