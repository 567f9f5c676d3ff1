"""EfficientNet-Lite0: a backbone that is fast enough to train on a CPU.

Source: Tan and Le, ICML 2019 (EfficientNet-B0). The Lite variant, which the authors released with
TensorFlow's TPU models, has ReLU6 in place of swish and no squeeze-and-excitation. Dilation in
place of stride as in DeepLab (Chen et al., 2017).
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

STEM_WIDTH = 32
HEAD_WIDTH = 1280
# (number of blocks, side of the depthwise kernel, stride of the first block, expansion, channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


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
    """EfficientNet-Lite0; dilation replaces the stride of the stages beyond the output stride.

    Padding is TensorFlow's SAME, which the published weights were trained with.

    Attributes:
        norm: factory of the norms.
        output_stride: 8, 16 or 32: the stride of the last features.
        first_dilation: see `layers.dilated_stages`.
        head: include the classifier's 1x1 convolution to 1280 channels, which segmentation does
            not use.
        remat: recompute the activations inside a block in the backward pass.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    norm: NormFactory
    output_stride: int = 16
    first_dilation: FirstDilation = "previous"
    head: bool = False
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], layout: DomainLayout
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """Returns {"low": 24 channels at stride 4, "high": 320 channels}, and "head" if made."""
        conv = functools.partial(
            ConvNorm, norm=self.norm, padding="same", activation=nn.relu6, dtype=self.dtype
        )
        x = conv(STEM_WIDTH, kernel_size=3, stride=2, name="stem")(x, layout)
        block = rematerialized(InvertedResidual, self.remat)
        features = {}
        stride, index = 2, 0
        strides = [stage[2] for stage in STAGES]
        stages = dilated_stages(strides, stride, self.output_stride, self.first_dilation)
        for (depth, kernel_size, _, expand, width), stage in zip(STAGES, stages, strict=True):
            stride *= stage.stride
            for i in range(depth):
                x = block(
                    width,
                    self.norm,
                    kernel_size,
                    expand,
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


BACKBONES: dict[str, Callable[..., nn.Module]] = {"efficientnet_lite0": EfficientNetLite}
