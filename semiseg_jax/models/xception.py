"""DeepLab's variant of Xception-65: strided separable convolutions in place of pooling.

Source: Xception (Chollet, CVPR 2017), modified in DeepLabV3+ (Chen et al., ECCV 2018), section 3.3
and figure 4: more layers, strided convolutions instead of pooling, and batch norm (in the last
block also ReLU) after each 3x3 depthwise convolution.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from semiseg_jax.models.dsbn import DomainLayout
from semiseg_jax.models.layers import (
    ConvNorm,
    FirstDilation,
    NormFactory,
    SeparableConvNorm,
    dilated_stages,
    rematerialized,
)

# Blocks with a stride: (name, channels of the three convolutions).
ENTRY = (
    ("entry_block1", (128, 128, 128)),
    ("entry_block2", (256, 256, 256)),
    ("entry_block3", (728, 728, 728)),
)
EXIT = ("exit_block1", (728, 1024, 1024))
MIDDLE_BLOCKS, MIDDLE_FEATURES = 16, (728, 728, 728)
LAST_FEATURES = (1536, 1536, 2048)


class XceptionBlock(nn.Module):
    """Three separable 3x3 convolutions, each preceded by a ReLU, and a shortcut around them.

    Attributes:
        features: output channels of the three convolutions.
        norm: factory of the norms.
        stride: of the third convolution.
        dilation: of the three convolutions.
        residual: add the shortcut; without it (the last block) a ReLU follows each depthwise and
            each pointwise convolution, and no ReLU precedes a separable convolution.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    features: tuple[int, int, int]
    norm: NormFactory
    stride: int = 1
    dilation: tuple[int, int, int] = (1, 1, 1)
    residual: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], layout: DomainLayout
    ) -> tuple[Float[Array, "b oh ow d"], Float[Array, "b h w e"]]:
        """Returns (output, input of the third convolution before its ReLU)."""
        y = third_input = x
        for i, (features, dilation) in enumerate(zip(self.features, self.dilation, strict=True)):
            third_input = y
            y = SeparableConvNorm(
                features,
                self.norm,
                stride=self.stride if i == 2 else 1,
                dilation=dilation,
                activation=None if self.residual else nn.relu,
                dtype=self.dtype,
                name=f"separable{i + 1}",
            )(nn.relu(y) if self.residual else y, layout)
        if not self.residual:
            return y, third_input
        if self.stride != 1 or x.shape[-1] != self.features[-1]:
            x = ConvNorm(
                self.features[-1],
                self.norm,
                stride=self.stride,
                activation=None,
                dtype=self.dtype,
                name="shortcut",
            )(x, layout)
        return x + y, third_input


class Xception(nn.Module):
    """Xception-65; dilation replaces the stride of the blocks beyond the output stride.

    Attributes:
        norm: factory of the norms.
        output_stride: 8, 16 or 32: the stride of the last features.
        first_dilation: see `layers.dilated_stages`; a stage is a block with a stride and the blocks
            after it.
        multi_grid: factors on the dilation of the last block's convolutions; () for none.
        remat: recompute the activations inside a block in the backward pass.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    norm: NormFactory
    output_stride: int = 16
    first_dilation: FirstDilation = "previous"
    multi_grid: tuple[int, ...] = ()
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], layout: DomainLayout
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """Returns {"low": 256 channels at stride 4, before the ReLU; "high": 2048 channels}."""
        conv = functools.partial(ConvNorm, norm=self.norm, kernel_size=3, dtype=self.dtype)
        x = conv(32, stride=2, name="stem1")(x, layout)
        x = conv(64, name="stem2")(x, layout)

        block = functools.partial(
            rematerialized(XceptionBlock, self.remat), norm=self.norm, dtype=self.dtype
        )
        *entries, exit_ = dilated_stages((2, 2, 2, 2), 2, self.output_stride, self.first_dilation)
        features = {}
        for (name, channels), stage in zip(ENTRY, entries, strict=True):
            dilation = (stage.dilation,) * 3
            x, third_input = block(channels, stride=stage.stride, dilation=dilation, name=name)(
                x, layout
            )
            if name == "entry_block2":
                # The last features at stride 4, as in TensorFlow's DeepLab.
                features["low"] = third_input
        dilation = (entries[-1].dilation_after,) * 3
        for i in range(MIDDLE_BLOCKS):
            name = f"middle_block{i + 1}"
            x, _ = block(MIDDLE_FEATURES, dilation=dilation, name=name)(x, layout)
        name, channels = EXIT
        dilation = (exit_.dilation,) * 3
        x, _ = block(channels, stride=exit_.stride, dilation=dilation, name=name)(x, layout)
        first, second, third = self.multi_grid or (1, 1, 1)
        after = exit_.dilation_after
        dilation = (after * first, after * second, after * third)
        x, _ = block(LAST_FEATURES, dilation=dilation, residual=False, name="exit_block2")(
            x, layout
        )
        return features | {"high": x}


BACKBONES: dict[str, Callable[..., nn.Module]] = {"xception65": Xception}

# The number of factors of a multi-grid: one for each convolution of the last block.
GRID_SIZES = {"xception65": 3}
