"""Cutout of strong views, which leaves the cut pixels out of the loss (PseudoSeg).

Source: googleinterns/wss, core/preprocess_utils.py, `cutout_with_mask`. The published code has one
mask of valid pixels for both views, so that nothing attends to the cut pixels of the weak view
either, although they are not cut out there.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, Key, Num

from semiseg_jax.methods import masks


def cut_square(
    keys: Key[Array, " n"],
    images: Num[Array, "n h w c"],
    valid: Bool[Array, "n h w"],
    fill: Num[ArrayLike, " c"] | float = 0.0,
    side: int = 100,
) -> tuple[Num[Array, "n h w c"], Bool[Array, "n h w"]]:
    """Fills one square of each image with a colour, and takes it out of the valid pixels.

    The centre is any pixel of the image with equal probability; the part of the square outside the
    image is lost. Its rows are centre - side / 2 to centre + side / 2, without the last.

    Args:
        keys: one for each image, from `image_keys`.
        images: strong views, before or after normalisation.
        valid: pixels that are not padding.
        fill: the mean colour in the unit of the images; 0 for normalised images.
        side: of the square, in pixels, even.

    Returns:
        Images of the same dtype, and the pixels that take part in the loss.
    """
    size = images.shape[1:3]

    def draw(key: Array) -> Int[Array, "4"]:
        centre = [
            jax.random.randint(key, (), 0, extent, jnp.int32)
            for key, extent in zip(jax.random.split(key), size, strict=True)
        ]
        corner = jnp.stack(centre) - side // 2
        return jnp.concatenate([corner, corner + side])

    cut = masks.box_masks(jax.vmap(draw)(keys), size)
    colour = jnp.asarray(fill).astype(images.dtype)
    return jnp.where(cut[..., None], colour, images), valid & ~cut
