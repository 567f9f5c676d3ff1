"""ConvNeXt backbones with dilation, and a tiny one for tests.

Source: Liu et al., CVPR 2022; layout, dilation and layer scale as in timm. DINOv3 (Simeoni et al.,
2025) has weights of the same networks. Stochastic depth is left out.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from semiseg_jax.models.dsbn import DomainLayout
from semiseg_jax.models.layers import Conv, FirstDilation, dilated_stages
from semiseg_jax.models.vit import LayerScale, layer_norm

EPSILON = 1e-6
_STEM_STRIDE = 4
_MLP_RATIO = 4
_INIT = nn.initializers.truncated_normal(0.02)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, layer norm, and a two-layer perceptron of each pixel; then a shortcut.

    Attributes:
        dilation: of the 7x7.
        epsilon: of the layer norm.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    dilation: int
    epsilon: float
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies the block."""
        width = x.shape[-1]
        conv = functools.partial(Conv, use_bias=True, kernel_init=_INIT, dtype=self.dtype)
        y = conv(width, 7, dilation=self.dilation, depthwise=True, name="depthwise")(x)
        y = layer_norm(self.epsilon, self.dtype, "norm")(y)
        y = nn.gelu(conv(_MLP_RATIO * width, name="fc1")(y), approximate=False)
        return x + LayerScale(self.dtype, name="scale")(conv(width, name="fc2")(y))


class ConvNeXt(nn.Module):
    """A ConvNeXt; dilation replaces the stride of the stages beyond the output stride.

    Attributes:
        widths, depths: of the four stages.
        output_stride: 8, 16 or 32: the stride of the last features.
        first_dilation: see `layers.dilated_stages`; of the convolution before a stage.
        epsilon: of the layer norms.
        remat: recompute the activations inside a block in the backward pass.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    output_stride: int = 16
    first_dilation: FirstDilation = "previous"
    epsilon: float = EPSILON
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], layout: DomainLayout
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """Returns {"low": features at stride 4, "high": features at the output stride}.

        `layout` has no effect, because there is no batch norm.
        """
        del layout
        norm = functools.partial(layer_norm, self.epsilon, self.dtype)
        x = norm(name="stem_norm")(self._shrink(x, self.widths[0], _STEM_STRIDE, 1, "stem"))
        block = nn.remat(ConvNeXtBlock) if self.remat else ConvNeXtBlock
        strides = [1] + [2] * (len(self.depths) - 1)
        stages = dilated_stages(strides, _STEM_STRIDE, self.output_stride, self.first_dilation)
        features = {}
        for i, (depth, stage) in enumerate(zip(self.depths, stages, strict=True)):
            if i:
                x = norm(name=f"shrink{i + 1}_norm")(x)
                name = f"shrink{i + 1}"
                x = self._shrink(x, self.widths[i], stage.stride, stage.dilation, name)
            for j in range(depth):
                name = f"stage{i + 1}_block{j + 1}"
                x = block(stage.dilation_after, self.epsilon, self.dtype, name=name)(x)
            if i == 0:
                features["low"] = x
        return features | {"high": x}

    def _shrink(
        self, x: Float[Array, "b h w c"], width: int, stride: int, dilation: int, name: str
    ) -> Float[Array, "b oh ow width"]:
        """Convolves patches of `stride` pixels, or 2x2 with dilation where the stride is replaced.

        Sides that are no multiples are padded, where timm would cut pixels off.
        """
        return Conv(
            width,
            max(stride, 2),
            stride,
            dilation if stride == 1 else 1,
            padding="same",
            use_bias=True,
            kernel_init=_INIT,
            dtype=self.dtype,
            name=name,
        )(x)


# (widths, depths)
SPECS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "convnext_tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_small": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "convnext_base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
    # For tests: every kind of layer, at almost no cost.
    "tiny_convnext": ((8, 16, 16, 24), (1, 1, 2, 1)),
}
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    name: functools.partial(ConvNeXt, *spec) for name, spec in SPECS.items()
}
