"""Positions of tokens: learned embeddings at other sizes, and the angles of rotary embedding.

Sources: `interpolate_pos_encoding` of facebookresearch/dinov2, `resample_abs_pos_embed` of timm,
`RopePositionEmbedding` of facebookresearch/dinov3; RoPE: Su et al., 2021.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from semiseg_jax.models import convolutions

PositionRule = Literal["original", "timm"]
# original: factors (n + .1) / side, by which it also samples, without antialiasing; timm: the size
# itself, with antialiasing. Networks that were tuned by one predict differently by the other.
POSITION_RULES = ("original", "timm")
# Added to the wanted size by the original rule.
_OFFSET = 0.1
# Sharpness of PyTorch's bicubic kernel, without and with antialiasing.
_SHARPNESS = {"original": -0.75, "timm": -0.5}
# Base of the periods of DINOv3's rotary embedding.
_ROTARY_BASE = 100.0


def interpolate(
    embedding: Float[Array, "patches c"],
    size: Sequence[convolutions.Dim],
    rule: PositionRule,
) -> Float[Array, "h w c"]:
    """Interpolates the position embedding of a square grid to another grid, bicubically.

    Args:
        embedding: of the patches, row by row; float32 or wider.
        size: (height, width) of the wanted grid, in patches.
        rule: see `PositionRule`. Both leave the embedding's own size as it is.
    """
    side = round(embedding.shape[0] ** 0.5)
    grid = embedding.reshape(side, side, -1)
    # The original rule samples at displaced places along a side of the own size, unless both are.
    is_own: Any = np.bool_(True)
    for n in size:
        is_own = is_own & (jnp.asarray(n) == side if is_symbolic_dim(n) else np.bool_(n == side))
    rows, columns = (bicubic_matrix(side, n, rule, is_own) for n in size)
    return jnp.einsum(
        "hi,wj,ijc->hwc",
        *(jnp.asarray(matrix, grid.dtype) for matrix in (rows, columns)),
        grid,
        precision=jax.lax.Precision.HIGHEST,
    )


def bicubic_matrix(
    size_in: int, size_out: convolutions.Dim, rule: PositionRule, is_own: Any = False
) -> Float[Any, "out in"]:
    """Weights of one-dimensional cubic interpolation of position embeddings; rows sum to 1.

    Args:
        size_in, size_out: numbers of patches; a symbolic `size_out` gives a traced matrix.
        rule: see `PositionRule`.
        is_own: whether the wanted grid is the embedding's own: then the identity.
    """
    xp: Any = jnp if is_symbolic_dim(size_out) else np
    places = xp.arange(size_out)[:, None] + 0.5
    total = jnp.asarray(size_out, jnp.float32) if is_symbolic_dim(size_out) else size_out
    columns = xp.arange(size_in)
    if rule == "original":
        centres = places * (size_in / (total + _OFFSET)) - 0.5
        low = xp.floor(centres)
        matrix = sum(
            xp.where(
                xp.clip(low + tap, 0, size_in - 1) == columns,
                _cubic_kernel(xp, centres - low - tap, _SHARPNESS[rule]),
                0,
            )
            for tap in (-1, 0, 1, 2)
        )
    else:
        scale = size_in / total
        distance = (columns + 0.5 - places * scale) / xp.maximum(scale, 1.0)
        matrix = _cubic_kernel(xp, distance, _SHARPNESS[rule])
        matrix = matrix / matrix.sum(axis=1, keepdims=True)
    return xp.where(is_own, places == columns + 0.5, matrix)


def _cubic_kernel(xp: Any, distance: Any, a: float) -> Any:
    """Keys' cubic convolution kernel (1981), which is 0 from distance 2 on."""
    x = xp.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return xp.where(x <= 1, near, xp.where(x < 2, far, 0))


class RotaryAngles(NamedTuple):
    """Sine and cosine of each token's angles, float32 [tokens, 1, head width]."""

    sin: Any
    cos: Any


def rotary_angles(
    size: Sequence[convolutions.Dim], width: int, num_prefix: int, num_suffix: convolutions.Dim = 0
) -> RotaryAngles:
    """Computes the angles of DINOv3: those of rows in the first half, of columns in the second.

    Coordinates are the patches' centres, mapped to -1..1 along each side; each angle occurs twice,
    as `rotate` needs it. Angles are float32 whatever the compute dtype: bfloat16 could not tell
    apart neighbouring rows of 57.

    Args:
        size: (height, width) of the grid of patches.
        width: of an attention head, a multiple of 4.
        num_prefix, num_suffix: tokens before and behind the patches, which are not rotated.
    """
    periods = _ROTARY_BASE ** (np.arange(width // 4) / (width // 4))
    height, columns = size
    along = [
        2 * np.pi * (2 * (jnp.arange(n, dtype=jnp.float32) + 0.5) / n - 1)[:, None] / periods
        for n in (height, columns)
    ]
    grid = (height, columns, width // 4)
    angles = jnp.concatenate(
        [jnp.broadcast_to(along[0][:, None], grid), jnp.broadcast_to(along[1][None], grid)], axis=-1
    )
    angles = jnp.tile(angles.reshape(height * columns, width // 2), (1, 2)).astype(jnp.float32)
    # A rotation by 0 instead of a slice and a join of the tokens.
    angles = jnp.pad(angles, ((num_prefix, num_suffix), (0, 0)))[:, None]
    return RotaryAngles(jnp.sin(angles), jnp.cos(angles))


def rotate(
    x: Float[Array, "b tokens heads width"], angles: RotaryAngles
) -> Float[Array, "b tokens heads width"]:
    """Rotates pairs (i, i + width / 2) of queries or keys by the tokens' angles, in float32."""
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    straight = jnp.concatenate([first, second], axis=-1)
    return (straight * angles.cos + turned * angles.sin).astype(x.dtype)
