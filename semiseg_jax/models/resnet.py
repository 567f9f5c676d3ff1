"""ResNet backbones with dilation, including a slim one for first runs and a tiny one for tests.

Source: He et al., CVPR 2016, with the stride of a bottleneck on its 3x3, as in torchvision;
dilation in place of stride, and multi-grid, as in DeepLab (Chen et al., 2017). A letter after the
name stands for the deep stem, three 3x3 in place of the 7x7, as in timm: c has 32, 32, 64 channels,
s has 64, 64, 128.
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
    dilated_stages,
    rematerialized,
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them (ResNet-18 and -34).

    Attributes:
        features: output channels.
        norm: factory of the norms.
        stride: of the first convolution.
        dilation: of the two convolutions.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    features: int
    norm: NormFactory
    stride: int = 1
    dilation: tuple[int, int] = (1, 1)
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], layout: DomainLayout
    ) -> Float[Array, "b oh ow d"]:
        """Applies the block; the result has `features` channels."""
        conv = functools.partial(ConvNorm, self.features, self.norm, dtype=self.dtype)
        first, second = self.dilation
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = conv(stride=self.stride, activation=None, name="shortcut")(x, layout)
        y = conv(kernel_size=3, stride=self.stride, dilation=first, name="conv1")(x, layout)
        y = conv(kernel_size=3, dilation=second, activation=None, name="conv2")(y, layout)
        return nn.relu(y + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 to four times the channels, and a shortcut around them (ResNet-50 and -101).

    Attributes:
        features: channels of the 3x3, a quarter of the output channels.
        norm: factory of the norms.
        stride: of the 3x3.
        dilation: of the 3x3; the second value, for a convolution after it, is not used.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    features: int
    norm: NormFactory
    stride: int = 1
    dilation: tuple[int, int] = (1, 1)
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], layout: DomainLayout
    ) -> Float[Array, "b oh ow d"]:
        """Applies the block; the result has 4 * `features` channels."""
        conv = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype)
        wide = functools.partial(conv, 4 * self.features, activation=None)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != 4 * self.features:
            shortcut = wide(stride=self.stride, name="shortcut")(x, layout)
        y = conv(self.features, name="conv1")(x, layout)
        y = conv(
            self.features,
            kernel_size=3,
            stride=self.stride,
            dilation=self.dilation[0],
            name="conv2",
        )(y, layout)
        y = wide(name="conv3")(y, layout)
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    """A residual network; dilation replaces the stride of the stages beyond the output stride.

    Attributes:
        norm: factory of the norms.
        block: class of the residual blocks.
        depths: number of blocks in each stage; four stages, except in "tiny".
        width: `features` of the blocks of the first stage; each later stage doubles it.
        output_stride: 8, 16 or 32: the stride of the last features.
        first_dilation: see `layers.dilated_stages`.
        multi_grid: factors on the dilation of the last stage, one for each of its blocks, as in
            DeepLabV3, section 3.3; () for none. With factors, the first block is dilated like the
            later blocks, whatever `first_dilation` is.
        stem: channels of the three 3x3 of the deep stem; () for one 7x7.
        stem_pool: 3x3 max-pool with stride 2 after the stem, for a total stride of 4; without it
            the stem is two 3x3 with stride 2.
        remat: recompute the activations inside a block in the backward pass.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    norm: NormFactory
    block: type[nn.Module] = BasicBlock
    depths: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    output_stride: int = 16
    first_dilation: FirstDilation = "previous"
    multi_grid: tuple[int, ...] = ()
    stem: tuple[int, ...] = ()
    stem_pool: bool = True
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], layout: DomainLayout
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """Returns {"low": features at stride 4, "high": features at the output stride}."""
        x = self._stem(x, layout)
        block = rematerialized(self.block, self.remat)
        features = {}
        strides = [1] + [2] * (len(self.depths) - 1)
        stages = dilated_stages(strides, 4, self.output_stride, self.first_dilation)
        for number, (depth, stage) in enumerate(zip(self.depths, stages, strict=True)):
            if self.multi_grid and number == len(self.depths) - 1:
                stage = stage._replace(dilation=stage.dilation_after)
                factors = self.multi_grid
            else:
                factors = (1,) * depth
            for i, factor in enumerate(factors):
                first = stage.dilation if i == 0 else stage.dilation_after
                x = block(
                    self.width * 2**number,
                    self.norm,
                    stride=stage.stride if i == 0 else 1,
                    dilation=(factor * first, factor * stage.dilation_after),
                    dtype=self.dtype,
                    name=f"stage{number + 1}_block{i + 1}",
                )(x, layout)
            if number == 0:
                features["low"] = x
        return features | {"high": x}

    def _stem(self, x: Float[Array, "b h w 3"], layout: DomainLayout) -> Float[Array, "b oh ow c"]:
        conv = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype)
        if not self.stem_pool:
            for name in ("stem", "stem2"):
                x = conv(self.width, kernel_size=3, stride=2, name=name)(x, layout)
            return x
        if not self.stem:
            x = conv(self.width, kernel_size=7, stride=2, name="stem")(x, layout)
        for i, channels in enumerate(self.stem):
            stride = 2 if i == 0 else 1
            x = conv(channels, kernel_size=3, stride=stride, name=f"stem{i + 1}")(x, layout)
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


_resnet50 = functools.partial(ResNet, block=Bottleneck, depths=(3, 4, 6, 3))
_resnet101 = functools.partial(ResNet, block=Bottleneck, depths=(3, 4, 23, 3))
_STEM_C, _STEM_S = (32, 32, 64), (64, 64, 128)

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": ResNet,
    "resnet50": _resnet50,
    "resnet50c": functools.partial(_resnet50, stem=_STEM_C),
    "resnet50s": functools.partial(_resnet50, stem=_STEM_S),
    "resnet101": _resnet101,
    "resnet101c": functools.partial(_resnet101, stem=_STEM_C),
    "resnet101s": functools.partial(_resnet101, stem=_STEM_S),
    # A quarter of ResNet-18's width and half of its depth: for first runs on a laptop.
    "resnet10_slim": functools.partial(ResNet, depths=(1, 1, 1, 1), width=16, stem_pool=False),
    # For tests: every kind of layer, at almost no cost.
    "tiny": functools.partial(ResNet, depths=(1, 1, 1), width=8, stem_pool=False),
}

# By backbone: the number of factors of a multi-grid, one for each block of the last stage.
GRID_SIZES = {name: 3 for name in BACKBONES if name.startswith(("resnet50", "resnet101"))} | {
    "resnet18": 2
}
