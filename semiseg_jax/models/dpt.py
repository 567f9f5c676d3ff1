"""The DPT head: features of four levels of a vision transformer, merged from coarse to fine.

Sources: Ranftl et al., ICCV 2021 (Vision Transformers for Dense Prediction); sizes,
order and resizing as in UniMatch V2 (Yang et al., TPAMI 2025; `model/semseg/dpt.py`). There is no
batch norm in it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from semiseg_jax.models import convolutions, layers


class DPTSpec(NamedTuple):
    """The widths of a DPT head.

    Attributes:
        features: of the fusion blocks and of the result.
        levels: of the four levels before the fusion, from fine to coarse.
    """

    features: int
    levels: tuple[int, int, int, int]


_SMALL = DPTSpec(64, (48, 96, 192, 384))
_BASE = DPTSpec(128, (96, 192, 384, 768))
_LARGE = DPTSpec(256, (256, 512, 1024, 1024))
# By width of the backbone's tokens. 32 is that of the backbones for tests.
SPECS = {384: _SMALL, 768: _BASE, 1024: _LARGE, 32: DPTSpec(8, (4, 8, 8, 16))}


class Enlarge(nn.Module):
    """A transposed convolution whose kernel is as large as its stride.

    Kernel [factor, factor, in, in] and bias, float32. As no two taps overlap, it is one matrix
    product.

    Attributes:
        factor: on both sides.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    factor: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow c"]:
        """Enlarges the features by `factor`."""
        b, h, w, c = x.shape
        shape = (self.factor, self.factor, c, c)
        # Each output reads one tap of c inputs.
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=2, batch_axis=(0, 1)
        )
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.einsum("bhwc,ijcd->bhiwjd", x, kernel) + bias
        return y.reshape(b, h * self.factor, w * self.factor, c)


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions, each behind a ReLU, and a shortcut around them.

    Attributes:
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies the unit."""
        conv = functools.partial(
            layers.Conv, x.shape[-1], kernel_size=3, use_bias=True, dtype=self.dtype
        )
        y = conv(name="conv1")(nn.relu(x))
        return x + conv(name="conv2")(nn.relu(y))


class Fusion(nn.Module):
    """Adds a finer level to the features so far, refines the sum, and enlarges it.

    Attributes:
        align_corners: see `layers.interpolation_matrix`.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    align_corners: bool
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        level: Float[Array, "b h w c"] | None,
        size: tuple[convolutions.Dim, convolutions.Dim],
    ) -> Float[Array, "b oh ow c"]:
        """Fuses; the result has `size` (height, width).

        Args:
            x: features of the coarser levels, or the coarsest level itself.
            level: of the size of x; None at the coarsest level.
            size: static.
        """
        if level is not None:
            x = x + ResidualUnit(self.dtype, name="unit1")(level)
        x = ResidualUnit(self.dtype, name="unit2")(x)
        # The published code has the 1x1 after the enlargement. Both are linear, on channels and on
        # pixels, and the weights of a resize sum to 1: the order does not matter, and before it the
        # convolution meets a quarter of the pixels.
        x = layers.Conv(x.shape[-1], use_bias=True, dtype=self.dtype, name="project")(x)
        return layers.resize(x, size, self.align_corners)


class DPT(nn.Module):
    """Merges four levels of one resolution to features at about 7/4 of the patch's side.

    Attributes:
        spec: the widths.
        align_corners: see `layers.interpolation_matrix`; the published networks align corners.
        remat: recompute the activations inside the fusions in the backward pass.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    spec: DPTSpec
    align_corners: bool
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, levels: Sequence[Float[Array, "b h w c"]]) -> Float[Array, "b oh ow f"]:
        """Merges the levels; the result has 8 times their height and width.

        Args:
            levels: from the earliest block to the last.
        """
        conv = functools.partial(layers.Conv, dtype=self.dtype)
        resized = []
        for i, (level, width) in enumerate(zip(levels, self.spec.levels, strict=True), 1):
            x = conv(width, use_bias=True, name=f"project{i}")(level)
            if i < 3:
                x = Enlarge({1: 4, 2: 2}[i], self.dtype, name=f"enlarge{i}")(x)
            elif i == 4:
                x = conv(width, kernel_size=3, stride=2, use_bias=True, name="shrink4")(x)
            resized.append(conv(self.spec.features, kernel_size=3, name=f"level{i}")(x))
        fusion = nn.remat(Fusion, static_argnums=(3,)) if self.remat else Fusion
        x = None
        for i in (4, 3, 2, 1):
            level = resized[i - 1]
            finer = resized[i - 2].shape[1:3] if i > 1 else tuple(2 * n for n in level.shape[1:3])
            fuse = fusion(self.align_corners, self.dtype, name=f"fusion{i}")
            x = fuse(level, None, finer) if x is None else fuse(x, level, finer)
        x = conv(self.spec.features, kernel_size=3, use_bias=True, name="output")(x)
        return nn.relu(x)
