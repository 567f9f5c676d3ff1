"""Cutout of strong views, which leaves the cut pixels out of the loss (PseudoSeg).

Source: googleinterns/wss, core/preprocess_utils.py, `cutout_with_mask`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Key, Num


def cut_square(
    images: Num[Array, "b h w c"],
    valid: Bool[Array, "b h w"],
    keys: Key[Array, " b"],
    fill: Num[ArrayLike, " c"] | float = 0.0,
    side: int = 100,
) -> tuple[Num[Array, "b h w c"], Bool[Array, "b h w"]]:
    """Fills one square of each image with a colour, and takes it out of the valid pixels.

    The centre is any pixel of the image with equal probability; the part of the square outside the
    image is lost. Its rows are centre - side / 2 to centre + side / 2, without the last.

    Args:
        images: strong views, before or after normalisation.
        valid: pixels that are not padding.
        keys: one for each image.
        fill: the mean colour in the unit of the images; 0 for normalised images.
        side: of the square, in pixels, even.

    Returns:
        Images of the same dtype, and the pixels that take part in the loss.
    """
    height, width = images.shape[1:3]

    def inside(key: Array) -> Array:
        row_key, column_key = jax.random.split(key)
        row = jax.random.randint(row_key, (), 0, height, jnp.int32) - side // 2
        column = jax.random.randint(column_key, (), 0, width, jnp.int32) - side // 2
        rows, columns = jnp.arange(height) - row, jnp.arange(width) - column
        return ((rows >= 0) & (rows < side))[:, None] & ((columns >= 0) & (columns < side))

    cut = jax.vmap(inside)(keys)
    colour = jnp.asarray(fill).astype(images.dtype)
    return jnp.where(cut[..., None], colour, images), valid & ~cut
