"""EfficientNet-Lite0, 1 and 2: backbones that are fast enough to train on a CPU.

Source: Tan and Le, ICML 2019 (EfficientNet-B0 and its compound scaling). The Lite variants, which
the authors released with TensorFlow's TPU models, have ReLU6 in place of swish and no
squeeze-and-excitation; stem, head and the numbers of blocks in the first and the last stage are
not scaled. Dilation in place of stride as in DeepLab (Chen et al., 2017).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

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

STEM_WIDTH = 32
HEAD_WIDTH = 1280


class StageSpec(NamedTuple):
    """A stage of blocks of one width.

    Attributes:
        depth: number of blocks.
        kernel_size: side of the depthwise kernel.
        stride: of the first block.
        expand: see `InvertedResidual`.
        width: channels.
    """

    depth: int
    kernel_size: int
    stride: int
    expand: int
    width: int


# Lite0; the others are scaled.
STAGES = (
    StageSpec(1, 3, 1, 1, 16),
    StageSpec(2, 3, 2, 6, 24),
    StageSpec(2, 5, 2, 6, 40),
    StageSpec(3, 3, 2, 6, 80),
    StageSpec(3, 5, 1, 6, 112),
    StageSpec(4, 5, 2, 6, 192),
    StageSpec(1, 3, 1, 6, 320),
)


def scaled_stages(width: float = 1.0, depth: float = 1.0) -> tuple[StageSpec, ...]:
    """Returns the stages of a variant.

    Args:
        width: factor on the channels, which are rounded to multiples of 8, and lowered by the
            rounding by 10 % at most.
        depth: factor on the number of blocks, rounded up; not of the first and the last stage.
    """

    def scale(index: int, stage: StageSpec) -> StageSpec:
        exact = stage.width * width
        rounded = int(exact + 4) // 8 * 8
        if rounded < 0.9 * exact:
            rounded += 8
        is_inner = 0 < index < len(STAGES) - 1
        # Rounded before, because 5 * 1.2 is above 6.
        blocks = math.ceil(round(stage.depth * depth, 6)) if is_inner else stage.depth
        return stage._replace(width=rounded, depth=blocks)

    return tuple(scale(i, stage) for i, stage in enumerate(STAGES))


class InvertedResidual(nn.Module):
    """1x1 to `expand` times the channels, depthwise k x k, linear 1x1 to `features`.

    Source: MobileNetV2 (Sandler et al., CVPR 2018), figure 3.

    Attributes:
        features: output channels.
        norm: factory of the norms.
        kernel_size, stride, dilation: of the depthwise convolution, in pixels.
        expand: factor on the input channels inside the block; 1 omits the first 1x1.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    features: int
    norm: NormFactory
    kernel_size: int
    expand: int
    stride: int = 1
    dilation: int = 1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], layout: DomainLayout
    ) -> Float[Array, "b oh ow d"]:
        """Applies the block; adds the input if the block preserves the shape."""
        conv = functools.partial(
            ConvNorm, norm=self.norm, padding="same", activation=nn.relu6, dtype=self.dtype
        )
        y = x
        if self.expand != 1:
            y = conv(self.expand * x.shape[-1], name="expand")(y, layout)
        y = conv(
            y.shape[-1],
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            depthwise=True,
            name="depthwise",
        )(y, layout)
        y = conv(self.features, activation=None, name="project")(y, layout)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite; dilation replaces the stride of the stages beyond the output stride.

    Padding is TensorFlow's SAME, which the published weights were trained with.

    Attributes:
        norm: factory of the norms.
        stages: of the variant, see `scaled_stages`.
        output_stride: 8, 16 or 32: the stride of the last features.
        first_dilation: see `layers.dilated_stages`.
        head: include the classifier's 1x1 convolution to 1280 channels, which segmentation does
            not use.
        remat: recompute the activations inside a block in the backward pass.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    norm: NormFactory
    stages: tuple[StageSpec, ...] = STAGES
    output_stride: int = 16
    first_dilation: FirstDilation = "previous"
    head: bool = False
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], layout: DomainLayout
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """Returns {"low": features at stride 4, "high": the last features}, and "head" if made.

        With Lite0 "low" has 24 channels and "high" 320.
        """
        conv = functools.partial(
            ConvNorm, norm=self.norm, padding="same", activation=nn.relu6, dtype=self.dtype
        )
        x = conv(STEM_WIDTH, kernel_size=3, stride=2, name="stem")(x, layout)
        block = rematerialized(InvertedResidual, self.remat)
        features = {}
        stride, index = 2, 0
        strides = [spec.stride for spec in self.stages]
        stages = dilated_stages(strides, stride, self.output_stride, self.first_dilation)
        for spec, stage in zip(self.stages, stages, strict=True):
            stride *= stage.stride
            for i in range(spec.depth):
                x = block(
                    spec.width,
                    self.norm,
                    spec.kernel_size,
                    spec.expand,
                    stride=stage.stride if i == 0 else 1,
                    dilation=stage.dilation if i == 0 else stage.dilation_after,
                    dtype=self.dtype,
                    name=f"block_{index}",
                )(x, layout)
                index += 1
            if stride == 4:
                features["low"] = x
        features["high"] = x
        if self.head:
            features["head"] = conv(HEAD_WIDTH, name="head")(x, layout)
        return features


# (factor on the widths, factor on the depths)
_SCALES = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    name: functools.partial(EfficientNetLite, stages=scaled_stages(*scales))
    for name, scales in _SCALES.items()
}
