"""Vision transformers: the backbones of DINOv2 and DINOv3, and tiny ones for tests.

Sources: ViT (Dosovitskiy et al., ICLR 2021); LayerScale (Touvron et al., ICCV 2021); DINOv2 (Oquab
et al., TMLR 2024; facebookresearch/dinov2), patches of 14 pixels and learned positions; DINOv3
(Simeoni et al., 2025; facebookresearch/dinov3), patches of 16 pixels, rotary positions and storage
tokens. DINOv2's mask token, which only pretraining reads, is left out, and so is the key bias of
DINOv3, which is fixed at 0. There is no stochastic depth: UniMatch V2 trains without.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from semiseg_jax.models import convolutions, positions
from semiseg_jax.models.dsbn import DomainLayout

_KERNEL_INIT = nn.initializers.truncated_normal(0.02)
# Factor on the residual branches at initialisation.
_SCALE_INIT = nn.initializers.constant(1e-5)
_MLP_RATIO = 4


class ViTSpec(NamedTuple):
    """The architecture of a vision transformer.

    Attributes:
        width: of the tokens.
        depth: number of blocks.
        heads: of the attention.
        patch: side of a patch in pixels.
        grid: side of the grid of the learned positions, in patches; 0 for rotary positions.
        storage: number of storage tokens (registers).
        taps: blocks whose results a dense head reads, in order; the last is the last block.
    """

    width: int
    depth: int
    heads: int
    patch: int
    grid: int
    storage: int
    taps: tuple[int, int, int, int]

    @property
    def epsilon(self) -> float:
        """Epsilon of the layer norms as published: 1e-6 in DINOv2, 1e-5 in DINOv3."""
        return 1e-6 if self.grid else 1e-5


_SMALL: dict[str, Any] = {"width": 384, "depth": 12, "heads": 6, "taps": (2, 5, 8, 11)}
_BASE: dict[str, Any] = _SMALL | {"width": 768, "heads": 12}
_LARGE: dict[str, Any] = {"width": 1024, "depth": 24, "heads": 16, "taps": (4, 11, 17, 23)}
_TINY: dict[str, Any] = {"width": 32, "depth": 4, "heads": 2, "taps": (0, 1, 2, 3)}
_DINOV2: dict[str, Any] = {"patch": 14, "grid": 37, "storage": 0}
_DINOV3: dict[str, Any] = {"patch": 16, "grid": 0, "storage": 4}

SPECS: dict[str, ViTSpec] = {
    "dinov2_vits14": ViTSpec(**_SMALL, **_DINOV2),
    "dinov2_vitb14": ViTSpec(**_BASE, **_DINOV2),
    "dinov2_vitl14": ViTSpec(**_LARGE, **_DINOV2),
    "dinov3_vits16": ViTSpec(**_SMALL, **_DINOV3),
    "dinov3_vitb16": ViTSpec(**_BASE, **_DINOV3),
    "dinov3_vitl16": ViTSpec(**_LARGE, **_DINOV3),
    # For tests: every kind of layer, at almost no cost.
    "tiny_dinov2": ViTSpec(**_TINY, **_DINOV2),
    "tiny_dinov3": ViTSpec(**_TINY, **_DINOV3),
}


class Attention(nn.Module):
    """Multi-head self-attention over all tokens; the softmax is float32.

    Queries, keys and values have kernels of their own, which files store fused or apart.

    Attributes:
        heads: the width of the tokens is a multiple of it.
        key_bias: whether keys have a bias.
        num_attended: the first tokens, which are attended to; None for all.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    heads: int
    key_bias: bool
    num_attended: convolutions.Dim | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], angles: positions.RotaryAngles | None
    ) -> Float[Array, "b n d"]:
        """Attends; `angles` rotate queries and keys, None for no rotation."""
        dense = functools.partial(nn.Dense, x.shape[-1], kernel_init=_KERNEL_INIT, dtype=self.dtype)
        query, key, value = (
            dense(use_bias=self.key_bias or name != "key", name=name)(x).reshape(
                *x.shape[:2], self.heads, -1
            )
            for name in ("query", "key", "value")
        )
        if angles is not None:
            query, key = positions.rotate(query, angles), positions.rotate(key, angles)
        lengths = None
        if self.num_attended is not None:
            lengths = jnp.full(x.shape[0], self.num_attended, jnp.int32)
        y = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths)
        return dense(name="proj")(y.reshape(x.shape))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and scaled by channel.

    Attributes:
        heads, key_bias, num_attended: see `Attention`.
        epsilon: of the layer norms.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    heads: int
    key_bias: bool
    epsilon: float
    num_attended: convolutions.Dim | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], angles: positions.RotaryAngles | None
    ) -> Float[Array, "b n d"]:
        """Applies the block."""
        width = x.shape[-1]
        attention = Attention(
            self.heads, self.key_bias, self.num_attended, self.dtype, name="attention"
        )
        y = attention(layer_norm(self.epsilon, self.dtype, "norm1")(x), angles)
        x = x + LayerScale(self.dtype, name="scale1")(y)
        dense = functools.partial(nn.Dense, kernel_init=_KERNEL_INIT, dtype=self.dtype)
        y = layer_norm(self.epsilon, self.dtype, "norm2")(x)
        y = nn.gelu(dense(_MLP_RATIO * width, name="fc1")(y), approximate=False)
        return x + LayerScale(self.dtype, name="scale2")(dense(width, name="fc2")(y))


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor; parameter `gamma` float32.

    Attributes:
        dtype: of the computation; None to promote the dtypes of input and parameters.
        init: initialiser of the factors.
    """

    dtype: DTypeLike | None = None
    init: nn.initializers.Initializer = _SCALE_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        """Scales x."""
        gamma = self.param("gamma", self.init, (x.shape[-1],), jnp.float32)
        x, gamma = nn.dtypes.promote_dtype(x, gamma, dtype=self.dtype)
        return x * gamma


def layer_norm(epsilon: float, dtype: DTypeLike | None, name: str) -> nn.LayerNorm:
    """Returns a layer norm over the channels, whose moments are float32 whatever the dtype.

    The variance is that of the differences from the mean: as E[x^2] - E[x]^2 it would lose the
    digits of tokens whose mean is large.
    """
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class PatchEmbedding(nn.Module):
    """A linear map of each patch; kernel [patch, patch, 3, width] and bias [width], float32.

    Attributes:
        width: of the tokens.
        patch: side of a patch in pixels.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    width: int
    patch: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b gh gw width"]:
        """Maps images, whose sides are multiples of the patch."""
        shape = (self.patch, self.patch, x.shape[-1], self.width)
        kernel = self.param("kernel", _KERNEL_INIT, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        # As a matrix product, which is fast forward and backward on every platform.
        b, h, w, c = x.shape
        x = x.reshape(b, h // self.patch, self.patch, w // self.patch, self.patch, c)
        return jnp.einsum("bhiwjc,ijcd->bhwd", x, kernel) + bias


class VisionTransformer(nn.Module):
    """A pre-norm vision transformer, whose results are features of patches.

    Attributes:
        spec: the architecture.
        epsilon: of the layer norms.
        position_rule: see `positions.interpolate`; without effect on rotary positions.
        token_multiple: zeros are appended to a multiple of this many tokens; no token attends to
            them, and they are dropped. 1 for none.
        remat: recompute the activations inside a block in the backward pass.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    spec: ViTSpec
    epsilon: float
    position_rule: positions.PositionRule = "original"
    token_multiple: int = 1
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layout: DomainLayout) -> dict[str, Any]:
        """Returns {"low", "middle", "high"}: the features of the four taps, [b, gh, gw, width].

        "low" and "high" are those of the first and the last tap, "middle" the two between. The
        final norm is applied to each; the tokens that are no patches are dropped.

        Args:
            x: images, whose sides are multiples of the patch.
            layout: without effect, because there is no batch norm.
        """
        del layout
        spec = self.spec
        x = PatchEmbedding(spec.width, spec.patch, self.dtype, name="patch_embed")(x)
        batch, height, width = x.shape[:3]
        x = self._with_prefix(x)
        num_prefix, num_tokens = 1 + spec.storage, x.shape[1]
        num_padding = -num_tokens % self.token_multiple if self.token_multiple > 1 else 0
        x = self._pad(x, num_padding)
        angles = None
        if not spec.grid:
            head = spec.width // spec.heads
            angles = positions.rotary_angles((height, width), head, num_prefix, num_padding)
        norm = layer_norm(self.epsilon, self.dtype, "norm")
        block = nn.remat(Block) if self.remat else Block
        taps = []
        for i in range(spec.depth):
            x = block(
                spec.heads,
                key_bias=bool(spec.grid),
                epsilon=self.epsilon,
                num_attended=num_tokens if self.token_multiple > 1 else None,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x, angles)
            if i in spec.taps:
                patches = norm(x)[:, num_prefix:num_tokens]
                taps.append(patches.reshape(batch, height, width, spec.width))
        return {"low": taps[0], "middle": tuple(taps[1:-1]), "high": taps[-1]}

    def _pad(self, x: Float[Array, "b n d"], count: convolutions.Dim) -> Float[Array, "b padded d"]:
        """Appends tokens that are 0."""
        return jnp.pad(x, ((0, 0), (0, count), (0, 0)))

    def _with_prefix(self, x: Float[Array, "b gh gw d"]) -> Float[Array, "b n d"]:
        """Adds the learned positions, and puts class and storage tokens before the patches."""
        spec = self.spec
        batch, height, width = x.shape[:3]
        cls = self.param("cls_token", _KERNEL_INIT, (1, 1, spec.width), jnp.float32)
        prefix = [cls]
        if spec.grid:
            shape = (1, 1 + spec.grid**2, spec.width)
            embedding = jnp.asarray(self.param("pos_embed", _KERNEL_INIT, shape, jnp.float32))
            prefix = [cls + embedding[:, :1]]
            grid = positions.interpolate(embedding[0, 1:], (height, width), self.position_rule)
            x = x + grid.astype(x.dtype)
        if spec.storage:
            shape = (1, spec.storage, spec.width)
            prefix.append(self.param("storage_tokens", _KERNEL_INIT, shape, jnp.float32))
        before = [
            jnp.broadcast_to(t, (batch, t.shape[1], spec.width)).astype(x.dtype) for t in prefix
        ]
        return jnp.concatenate([*before, x.reshape(batch, height * width, spec.width)], axis=1)


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    name: functools.partial(VisionTransformer, spec) for name, spec in SPECS.items()
}
