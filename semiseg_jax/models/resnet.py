"""ResNet backbones with dilation, and a tiny one for tests and first runs.

Source: He et al., CVPR 2016; dilation in place of stride as in DeepLab (Chen et al., 2017).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from semiseg_jax.models.dsbn import Batch
from semiseg_jax.models.layers import ConvNorm, NormFactory


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (ResNet-18 and -34)."""

    features: int
    norm: NormFactory
    stride: int = 1
    dilation: int = 1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], batch: Batch) -> Float[Array, "b oh ow d"]:
        """One block; output channels are `features`."""
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = ConvNorm(
                self.features,
                self.norm,
                stride=self.stride,
                activation=None,
                dtype=self.dtype,
                name="shortcut",
            )(x, batch)
        y = ConvNorm(
            self.features, self.norm, 3, self.stride, self.dilation, dtype=self.dtype, name="conv1"
        )(x, batch)
        y = ConvNorm(
            self.features,
            self.norm,
            3,
            dilation=self.dilation,
            activation=None,
            dtype=self.dtype,
            name="conv2",
        )(y, batch)
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    """Residual network whose later stages trade stride for dilation.

    Attributes:
        norm: makes the norm of a layer.
        block: residual block.
        depths: blocks in each of the four stages.
        width: channels of the stem and the first stage; each later stage doubles them.
        output_stride: 8, 16 or 32: input pixels a side of one pixel of the last features.
        stem_pool: 3x3 max-pool with stride 2 after the stem (stride 4 in all); without it the
            stem is a 3x3 with stride 2 followed by another.
        dtype: of the computation; None for that of input and parameters together.
    """

    norm: NormFactory
    block: Callable[..., nn.Module] = BasicBlock
    depths: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    output_stride: int = 16
    stem_pool: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], batch: Batch
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """{"low": features at stride 4, "high": the last features at the output stride}."""
        stem = functools.partial(ConvNorm, self.width, self.norm, stride=2, dtype=self.dtype)
        if self.stem_pool:
            x = stem(kernel_size=7, name="stem")(x, batch)
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        else:
            x = stem(kernel_size=3, name="stem")(x, batch)
            x = stem(kernel_size=3, name="stem2")(x, batch)
        features = {}
        stride, dilation = 4, 1
        for stage, depth in enumerate(self.depths):
            step = 1 if stage == 0 else 2
            # torchvision's convention: a stage that would pass the output stride keeps its
            # resolution, and its first block still has the dilation of the stage before.
            first_dilation = dilation
            if stride * step > self.output_stride:
                dilation, step = dilation * step, 1
            stride *= step
            for i in range(depth):
                x = self.block(
                    self.width * 2**stage,
                    self.norm,
                    stride=step if i == 0 else 1,
                    dilation=first_dilation if i == 0 else dilation,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{i + 1}",
                )(x, batch)
            if stage == 0:
                features["low"] = x
        return features | {"high": x}


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": functools.partial(ResNet, depths=(2, 2, 2, 2)),
    # A quarter of ResNet-18's width and half its depth: for first runs on a laptop.
    "resnet10_slim": functools.partial(ResNet, depths=(1, 1, 1, 1), width=16, stem_pool=False),
    # For tests: every kind of layer, next to no time.
    "tiny": functools.partial(ResNet, depths=(1, 1, 1), width=8, stem_pool=False),
}
