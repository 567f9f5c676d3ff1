"""Connected components of masks on the device, under static shapes.

OpenCV finds components on the host. Here each pixel takes the smallest value among its neighbours
until nothing changes. A sweep carries a value through a whole row and a whole column at once, so
that the number of sweeps is the number of turns on the way through a component, and not its length
in pixels. The loop ends for all images together: on a mesh each sweep has one all-reduce of one
boolean.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def label_components(mask: Bool[Array, "n h w"]) -> Int[Array, "n h w"]:
    """Labels the components of each mask; pixels that touch at a corner are connected.

    Returns:
        The index (row * w + column) of the first pixel of the component, int32, and h * w outside
        the mask.
    """
    height, width = mask.shape[1:]
    index = jnp.arange(height * width, dtype=jnp.int32).reshape(height, width)
    return _spread_minimum(jnp.broadcast_to(index, mask.shape), mask, height * width, corners=True)


def fill_holes(mask: Bool[Array, "n h w"]) -> Bool[Array, "n h w"]:
    """Adds the holes: what no path from the border of the image reaches outside the mask.

    The path moves along rows and columns, because the mask itself is connected at corners too.
    """
    height, width = mask.shape[1:]
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    inner = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
    start = jnp.broadcast_to(inner.astype(jnp.int32), mask.shape)
    return _spread_minimum(start, ~mask, 1, corners=False) == 1


def _spread_minimum(
    values: Int[Array, "n h w"], mask: Bool[Array, "n h w"], outside: int, corners: bool
) -> Int[Array, "n h w"]:
    """Gives every pixel of the mask the smallest value of its component.

    Args:
        values: at most `outside`.
        mask: the pixels to connect.
        outside: the result outside the mask.
        corners: connect pixels that touch at a corner.
    """
    runs = {axis: _run_starts(mask, axis) for axis in (1, 2)}

    def sweep(state: tuple[Array, Array]) -> tuple[Array, Array]:
        old, _ = state
        new = old
        for axis, starts in runs.items():
            new = _spread_along_runs(new, starts, axis)
        if corners:
            new = _minimum_of_neighbours(new, outside)
        new = jnp.where(mask, new, outside)
        return new, jnp.any(new != old)

    first = jnp.where(mask, values, outside)
    return jax.lax.while_loop(lambda state: state[1], sweep, (first, jnp.array(True)))[0]


def _run_starts(mask: Bool[Array, "n h w"], axis: int) -> Int[Array, "n h w"]:
    """Returns, for each pixel of the mask, where along the axis its run of pixels starts.

    Each pixel outside the mask has a negative number of its own, so that it is no part of a run.
    """
    position = jax.lax.broadcasted_iota(jnp.int32, mask.shape, axis)
    before = jnp.roll(mask, 1, axis) & (position > 0)
    starts = jax.lax.cummax(jnp.where(mask & ~before, position, 0), axis)
    return jnp.where(mask, starts, -1 - position)


def _spread_along_runs(
    values: Int[Array, "n h w"], starts: Int[Array, "n h w"], axis: int
) -> Int[Array, "n h w"]:
    """Gives every pixel the smallest value of its run, by steps of 1, 2, 4, … pixels."""
    step = 1
    while step < values.shape[axis]:
        # A roll wraps around; pixels from the other end belong to the same run or do not count.
        for shift in (step, -step):
            same_run = jnp.roll(starts, shift, axis) == starts
            values = jnp.where(same_run, jnp.minimum(values, jnp.roll(values, shift, axis)), values)
        step *= 2
    return values


def _minimum_of_neighbours(values: Int[Array, "n h w"], outside: int) -> Int[Array, "n h w"]:
    """Gives every pixel the smallest value of its 3x3 neighbourhood."""
    return jax.lax.reduce_window(
        values, jnp.int32(outside), jax.lax.min, (1, 3, 3), (1, 1, 1), "SAME"
    )
