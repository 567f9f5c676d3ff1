"""ResNet backbones with dilation, a slim one for first runs, and a tiny one for tests.

Source: He et al., CVPR 2016, with the stride on the 3x3 of a bottleneck, as torchvision has it;
dilation in place of stride and multi-grid as in DeepLab (Chen et al., 2017). The names with a
letter have the deep stem, three 3x3 in place of the 7x7, as in timm: c with 32, 32, 64 channels, s
with 64, 64, 128.
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
    dilated_stages,
    rematerialized,
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (ResNet-18 and -34).

    Attributes:
        features: output channels.
        norm: makes the norms.
        stride: of the first convolution.
        dilation: of the two convolutions.
        dtype: of the computation; None for that of input and parameters together.
    """

    features: int
    norm: NormFactory
    stride: int = 1
    dilation: tuple[int, int] = (1, 1)
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], batch: Batch) -> Float[Array, "b oh ow d"]:
        """One block; output channels are `features`."""
        conv = functools.partial(ConvNorm, self.features, self.norm, dtype=self.dtype)
        first, second = self.dilation
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = conv(stride=self.stride, activation=None, name="shortcut")(x, batch)
        y = conv(kernel_size=3, stride=self.stride, dilation=first, name="conv1")(x, batch)
        y = conv(kernel_size=3, dilation=second, activation=None, name="conv2")(y, batch)
        return nn.relu(y + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 to four times the channels, around a shortcut (ResNet-50 and -101).

    Attributes:
        features: channels of the 3x3, a quarter of the output's.
        norm: makes the norms.
        stride: of the 3x3.
        dilation: of the 3x3, and of what follows it, which has no use for one.
        dtype: of the computation; None for that of input and parameters together.
    """

    features: int
    norm: NormFactory
    stride: int = 1
    dilation: tuple[int, int] = (1, 1)
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], batch: Batch) -> Float[Array, "b oh ow d"]:
        """One block; output channels are 4 * `features`."""
        conv = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype)
        wide = functools.partial(conv, 4 * self.features, activation=None)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != 4 * self.features:
            shortcut = wide(stride=self.stride, name="shortcut")(x, batch)
        y = conv(self.features, name="conv1")(x, batch)
        y = conv(
            self.features,
            kernel_size=3,
            stride=self.stride,
            dilation=self.dilation[0],
            name="conv2",
        )(y, batch)
        y = wide(name="conv3")(y, batch)
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    """Residual network whose later stages trade stride for dilation.

    Attributes:
        norm: makes the norm of a layer.
        block: residual block.
        depths: blocks in each of the stages, of which there are four but in "tiny".
        width: `features` of the blocks of the first stage; each later stage doubles them.
        output_stride: 8, 16 or 32: input pixels a side of one pixel of the last features.
        first_dilation: see `layers.dilated_stages`.
        multi_grid: factors on the last stage's dilation, one for each of its blocks, the first one
            included whatever `first_dilation` is (DeepLabV3, section 3.3); () for none.
        stem: channels of the three 3x3 of the deep stem; () for one 7x7.
        stem_pool: 3x3 max-pool with stride 2 after the stem (stride 4 in all); without it the
            stem is a 3x3 with stride 2 followed by another.
        remat: keep no activations from inside a block for the backward pass.
        dtype: of the computation; None for that of input and parameters together.
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
        self, x: Float[Array, "b h w 3"], batch: Batch
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """{"low": features at stride 4, "high": the last features at the output stride}."""
        x = self._stem(x, batch)
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
                )(x, batch)
            if number == 0:
                features["low"] = x
        return features | {"high": x}

    def _stem(self, x: Float[Array, "b h w 3"], batch: Batch) -> Float[Array, "b oh ow c"]:
        conv = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype)
        if not self.stem_pool:
            for name in ("stem", "stem2"):
                x = conv(self.width, kernel_size=3, stride=2, name=name)(x, batch)
            return x
        if not self.stem:
            x = conv(self.width, kernel_size=7, stride=2, name="stem")(x, batch)
        for i, channels in enumerate(self.stem):
            stride = 2 if i == 0 else 1
            x = conv(channels, kernel_size=3, stride=stride, name=f"stem{i + 1}")(x, batch)
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
    # A quarter of ResNet-18's width and half its depth: for first runs on a laptop.
    "resnet10_slim": functools.partial(ResNet, depths=(1, 1, 1, 1), width=16, stem_pool=False),
    # For tests: every kind of layer, next to no time.
    "tiny": functools.partial(ResNet, depths=(1, 1, 1), width=8, stem_pool=False),
}

# Units of the last stage, which a multi-grid has a factor for each of.
GRID_SIZES = {name: 3 for name in BACKBONES if name.startswith(("resnet50", "resnet101"))} | {
    "resnet18": 2
}
