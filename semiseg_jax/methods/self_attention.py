"""Refines class maps by self-attention over features of several levels (PseudoSeg).

Source: Zou et al., ICLR 2021, section 3.2, equation 3; googleinterns/wss,
core/train_utils_core.py, `compute_self_att_v2`.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from semiseg_jax.methods.precision import at_least_float32
from semiseg_jax.models import layers
from semiseg_jax.models.dsbn import DomainLayout

# The initial weights of TensorFlow's slim.conv2d.
KERNEL_INIT = nn.initializers.glorot_uniform()


class SelfAttention(nn.Module):
    """Moves class scores between similar positions, and turns them into logits.

    Query and key are linear in the hypercolumn of a position: its features of all levels. The
    attended scores are added to the scores themselves, which then range from 0 to 2; the background
    gets 2 minus their maximum; a 1x1 convolution and a norm follow. Neither hypercolumns nor scores
    get a gradient: the loss of the logits trains this module alone.

    The published norm is a batch norm without scale, epsilon 1e-3, momentum .999.

    Attributes:
        num_classes: C.
        norm: factory of the norm.
        dim: channels of query and key.
    """

    num_classes: int
    norm: layers.NormFactory
    dim: int = 128

    @nn.compact
    def __call__(
        self,
        levels: Sequence[Float[Array, "n _h _w _c"]],
        scores: Float[Array, "n h w k"],
        layout: DomainLayout,
        valid: Bool[Array, "n h w"] | None = None,
    ) -> Float[Array, "n h w classes"]:
        """Computes logits at the size of the scores, in float32 (float64 for float64).

        Args:
            levels: features at one or more levels of the backbone, of any size.
            scores: class maps of `grad_cam`: C - 1, where class 0 is the background, or C for data
                without a background class.
            layout: of the batch, for the norm.
            valid: positions that are not padding. Nothing attends to padding, and padding has
                score 0 and attends to all valid positions alike, so that its content reaches no
                moment of the norm. (In the published code it does.)

        Raises:
            ValueError: the scores have neither C nor C - 1 channels.
        """
        channels = scores.shape[-1]
        if channels not in (self.num_classes - 1, self.num_classes):
            raise ValueError(
                f"There are {channels} class maps for {self.num_classes} classes: pass one for "
                "each class, with or without the background."
            )
        columns = _hypercolumns(levels, scores.shape[1:3])
        scores = jax.lax.stop_gradient(scores.astype(columns.dtype))
        if valid is not None:
            scores = jnp.where(valid[..., None], scores, 0)
        query = layers.Conv(self.dim, kernel_init=KERNEL_INIT, name="query")(columns)
        key = layers.Conv(self.dim, kernel_init=KERNEL_INIT, name="key")(columns)
        scores = scores + _attend(query, key, scores, valid)
        if channels < self.num_classes:
            background = 2 - jnp.max(scores, axis=-1, keepdims=True)
            scores = jnp.concatenate([background, scores], axis=-1)
        logits = layers.Conv(self.num_classes, kernel_init=KERNEL_INIT, name="conv")(scores)
        return self.norm(name="norm")(logits, layout)


def _hypercolumns(
    levels: Sequence[Float[Array, "n _h _w _c"]], size: Sequence[int]
) -> Float[Array, "n h w c"]:
    """Concatenates features of several levels at one size, without gradient, at least float32."""
    levels = [at_least_float32(level) for level in levels]
    resized = [layers.resize(level, size, align_corners=True) for level in levels]
    return jax.lax.stop_gradient(jnp.concatenate(resized, axis=-1))


def _attend(
    query: Float[Array, "n h w d"],
    key: Float[Array, "n h w d"],
    values: Float[Array, "n h w k"],
    valid: Bool[Array, "n h w"] | None,
) -> Float[Array, "n h w k"]:
    """Averages the values by softmax(query . key / sqrt(d)) over the valid positions."""
    precision = jax.lax.Precision.HIGHEST
    similarity = jnp.einsum("bhwd,bijd->bhwij", query, key, precision=precision)
    similarity = similarity / math.sqrt(query.shape[-1])
    if valid is not None:
        similarity = jnp.where(valid[:, :, :, None, None], similarity, 0)
        # Finite, so that an image without a valid position gets equal weights and not NaN.
        similarity = jnp.where(valid[:, None, None], similarity, -1e9)
    weights = jax.nn.softmax(similarity, axis=(-2, -1))
    return jnp.einsum("bhwij,bijk->bhwk", weights, values, precision=precision)
