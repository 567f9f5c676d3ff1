"""Xception-65 as DeepLab has it: strided separable convolutions in place of pooling.

Source: Xception (Chollet, CVPR 2017), modified in DeepLabV3+ (Chen et al., ECCV 2018), section 3.3
and figure 4: more layers, all pooling replaced, batch norm (and in the last block ReLU) after each
3x3 depthwise convolution too.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from semiseg_jax.models.dsbn import Batch
from semiseg_jax.models.layers import (
    ConvNorm,
    FirstDilation,
    NormFactory,
    SeparableConvNorm,
    dilated_stages,
    rematerialized,
)

# Blocks with a stride: their name, the channels of their three convolutions.
ENTRY = (
    ("entry_block1", (128, 128, 128)),
    ("entry_block2", (256, 256, 256)),
    ("entry_block3", (728, 728, 728)),
)
EXIT = ("exit_block1", (728, 1024, 1024))
MIDDLE_BLOCKS, MIDDLE_FEATURES = 16, (728, 728, 728)
LAST_FEATURES = (1536, 1536, 2048)


class XceptionBlock(nn.Module):
    """Three separable 3x3 convolutions, each after a ReLU, and a shortcut around them.

    Attributes:
        features: output channels of the three.
        norm: makes the norms.
        stride: of the third convolution.
        dilation: of the three.
        residual: add the shortcut; without it ReLUs come after each depthwise and each pointwise
            convolution instead of before them (the last block).
        dtype: of the computation; None for that of input and parameters together.
    """

    features: tuple[int, int, int]
    norm: NormFactory
    stride: int = 1
    dilation: tuple[int, int, int] = (1, 1, 1)
    residual: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], batch: Batch
    ) -> tuple[Float[Array, "b oh ow d"], Float[Array, "b h w e"]]:
        """(the block's output, what enters its third convolution before the ReLU)."""
        y = inner = x
        for i, (features, dilation) in enumerate(zip(self.features, self.dilation, strict=True)):
            inner = y
            y = SeparableConvNorm(
                features,
                self.norm,
                stride=self.stride if i == 2 else 1,
                dilation=dilation,
                activation=None if self.residual else nn.relu,
                dtype=self.dtype,
                name=f"separable{i + 1}",
            )(nn.relu(y) if self.residual else y, batch)
        if not self.residual:
            return y, inner
        if self.stride != 1 or x.shape[-1] != self.features[-1]:
            x = ConvNorm(
                self.features[-1],
                self.norm,
                stride=self.stride,
                activation=None,
                dtype=self.dtype,
                name="shortcut",
            )(x, batch)
        return x + y, inner


class Xception(nn.Module):
    """Xception-65, whose later blocks trade stride for dilation.

    Attributes:
        norm: makes the norm of a layer.
        output_stride: 8, 16 or 32: input pixels a side of one pixel of the last features.
        first_dilation: see `layers.dilated_stages`; a block with a stride is a stage, with the
            blocks that follow it.
        multi_grid: factors on the dilation of the last block's convolutions; () for none.
        remat: keep no activations from inside a block for the backward pass.
        dtype: of the computation; None for that of input and parameters together.
    """

    norm: NormFactory
    output_stride: int = 16
    first_dilation: FirstDilation = "previous"
    multi_grid: tuple[int, ...] = ()
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], batch: Batch
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """{"low": 256 channels at stride 4, not yet activated; "high": 2048 at output stride}."""
        conv = functools.partial(ConvNorm, norm=self.norm, kernel_size=3, dtype=self.dtype)
        x = conv(32, stride=2, name="stem1")(x, batch)
        x = conv(64, name="stem2")(x, batch)

        block = functools.partial(
            rematerialized(XceptionBlock, self.remat), norm=self.norm, dtype=self.dtype
        )
        *entries, exit_ = dilated_stages((2, 2, 2, 2), 2, self.output_stride, self.first_dilation)
        features = {}
        for (name, channels), stage in zip(ENTRY, entries, strict=True):
            dilation = (stage.dilation,) * 3
            x, inner = block(channels, stride=stage.stride, dilation=dilation, name=name)(x, batch)
            if name == "entry_block2":
                # Where TensorFlow's DeepLab takes it, as far as stride 4 goes.
                features["low"] = inner
        dilation = (entries[-1].dilation_after,) * 3
        for i in range(MIDDLE_BLOCKS):
            name = f"middle_block{i + 1}"
            x, _ = block(MIDDLE_FEATURES, dilation=dilation, name=name)(x, batch)
        name, channels = EXIT
        dilation = (exit_.dilation,) * 3
        x, _ = block(channels, stride=exit_.stride, dilation=dilation, name=name)(x, batch)
        first, second, third = self.multi_grid or (1, 1, 1)
        after = exit_.dilation_after
        dilation = (after * first, after * second, after * third)
        x, _ = block(LAST_FEATURES, dilation=dilation, residual=False, name="exit_block2")(x, batch)
        return features | {"high": x}


BACKBONES: dict[str, Callable[..., nn.Module]] = {"xception65": Xception}

# Convolutions of the last block, which a multi-grid has a factor for each of.
GRID_SIZES = {"xception65": 3}
