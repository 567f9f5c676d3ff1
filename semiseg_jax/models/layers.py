"""Layers shared by the networks: convolution with norm, separable convolution, resizing."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from semiseg_jax.models import convolutions
from semiseg_jax.models.dsbn import MOMENTS, DomainLayout, DomainNorm

# From a name to the norm, such as `dsbn.DomainNormFactory`; for a trained network, `folding.Shift`.
NormFactory = Callable[..., DomainNorm]
Activation = Callable[[jax.Array], jax.Array]
# Dilation of the first block of a stage; see `dilated_stages`.
FirstDilation = Literal["previous", "stage"]
FIRST_DILATIONS = ("previous", "stage")

# He et al. (ICCV 2015), equation 14. In a depthwise kernel [k, k, 1, c] each output reads one input
# channel, and each input feeds one output channel: both fans are k * k, which is flax's "fan_in".
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
DEPTHWISE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Conv(nn.Module):
    """Convolution, by default without bias; kernel [k, k, in / groups, features] float32.

    Attributes:
        features: output channels.
        kernel_size: side of the square kernel, in pixels.
        stride: in pixels, for rows and columns.
        dilation: distance between kernel taps, in pixels.
        depthwise: one filter per channel; `features` must equal the input channels.
        padding: "torch" (dilation * (k - 1) / 2 on each side), "same" (TensorFlow's) or explicit;
            see `convolutions.conv2d`.
        use_bias: add a bias [features].
        kernel_init: initialiser of the kernel; None for He's, with the fan of a dense or depthwise
            kernel.
        dtype: of the computation; None to promote the dtypes of input and kernel.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    padding: convolutions.Padding = "torch"
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow features"]:
        """Convolves x."""
        inputs = 1 if self.depthwise else x.shape[-1]
        shape = (self.kernel_size, self.kernel_size, inputs, self.features)
        init = self.kernel_init or (DEPTHWISE_INIT if self.depthwise else KERNEL_INIT)
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = convolutions.conv2d(
            x,
            kernel,
            stride=self.stride,
            dilation=self.dilation,
            padding=self.padding,
            groups=x.shape[-1] if self.depthwise else 1,
        )
        return y if bias is None else y + bias


class ConvNorm(nn.Module):
    """Convolution, then a domain norm, then an optional activation.

    Attributes:
        features, kernel_size, stride, dilation, depthwise, padding: see `Conv`.
        norm: factory of the norm.
        activation: applied after the norm; None for none.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    features: int
    norm: NormFactory
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    padding: convolutions.Padding = "torch"
    activation: Activation | None = nn.relu
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], layout: DomainLayout
    ) -> Float[Array, "b oh ow features"]:
        """Convolves and normalises x."""
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.dilation,
            self.depthwise,
            self.padding,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = self.norm(name="norm")(x, layout)
        return x if self.activation is None else self.activation(x)


class SeparableConvNorm(nn.Module):
    """Depthwise then pointwise convolution, with a norm and an activation after each.

    Source: DeepLabV3+ (Chen et al., ECCV 2018), section 3.2, atrous separable convolution.

    Attributes:
        features: output channels.
        norm: factory of the norms.
        kernel_size, stride, dilation: of the depthwise convolution, in pixels.
        activation: applied after each norm; None for none.
        norm_between: apply a norm and an activation after the depthwise convolution too; without
            them the two convolutions are one linear map.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    features: int
    norm: NormFactory
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    activation: Activation | None = nn.relu
    norm_between: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], layout: DomainLayout
    ) -> Float[Array, "b oh ow features"]:
        """Convolves and normalises x."""
        depthwise = {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "depthwise": True,
            "dtype": self.dtype,
            "name": "depthwise",
        }
        if self.norm_between:
            x = ConvNorm(x.shape[-1], self.norm, activation=self.activation, **depthwise)(x, layout)
        else:
            x = Conv(x.shape[-1], **depthwise)(x)
        return ConvNorm(
            self.features,
            self.norm,
            activation=self.activation,
            dtype=self.dtype,
            name="pointwise",
        )(x, layout)


class Dropout(nn.Module):
    """Dropout with a separate random key for each image.

    The features that an image loses depend on the position of the image in its stream, and not on
    the number of devices over which the streams are joined.

    Attributes:
        rate: share of the features that training sets to 0.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], layout: DomainLayout) -> Float[Array, "b h w c"]:
        """Sets a share `rate` of the features to 0 and scales the others up; only in training."""
        if self.rate == 0 or not layout.train:
            return x
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            self.make_rng("dropout"), jnp.asarray(layout.rng_ids(x.shape[0]), jnp.uint32)
        )
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def rematerialized(block: type[nn.Module], enabled: bool) -> Callable[..., Callable[..., Any]]:
    """Returns the block class (called with x and layout) with rematerialisation, if enabled.

    The backward pass then recomputes the activations inside the block from the block's input. The
    forward pass saves that input and the moments of the norms.
    """
    policy = jax.checkpoint_policies.save_only_these_names(MOMENTS)
    return nn.remat(block, static_argnums=(2,), policy=policy) if enabled else block


class StageGeometry(NamedTuple):
    """Stride and dilations of a stage, in pixels of the stage's input.

    Attributes:
        stride: of the strided convolution.
        dilation: of the strided convolution and of the convolutions before it in the block.
        dilation_after: of every later convolution of the stage.
    """

    stride: int
    dilation: int
    dilation_after: int


def dilated_stages(
    strides: Sequence[int],
    input_stride: int,
    output_stride: int,
    first_dilation: FirstDilation = "previous",
) -> list[StageGeometry]:
    """Replaces stride by dilation in the stages that would exceed the output stride.

    Source: DeepLab (Chen et al., 2017), section 3.1.

    Args:
        strides: of the stages as published.
        input_stride: stride of the input of the first stage.
        output_stride: wanted stride of the output of the last stage.
        first_dilation: dilation of the convolution that loses its stride. "previous": that of the
            convolution before it, so that the dilated network computes the same function as the
            strided network, on more pixels (torchvision, timm, TensorFlow's DeepLab). "stage": that
            of the convolutions after it (segmentation_models_pytorch).
    """
    stages, dilation, reached = [], 1, input_stride
    for stride in strides:
        previous = dilation
        if reached * stride > output_stride:
            dilation, stride = dilation * stride, 1
        reached *= stride
        first = previous if first_dilation == "previous" else dilation
        stages.append(StageGeometry(stride, first, dilation))
    return stages


def interpolation_matrix(
    size_in: int, size_out: int, align_corners: bool = False
) -> Float[np.ndarray, "out in"]:
    """Weights of one-dimensional linear interpolation; each row sums to 1.

    Half-pixel centres without antialiasing: the centre of output i is at (i + .5) * in / out - .5,
    clamped to the image. With `align_corners` the first and last centres of both sizes coincide.
    """
    if align_corners:
        centres = np.arange(size_out) * ((size_in - 1) / max(size_out - 1, 1))
    else:
        centres = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    centres = np.clip(centres, 0, size_in - 1)
    low = np.minimum(np.floor(centres).astype(int), max(size_in - 2, 0))
    fraction = centres - low
    matrix = np.zeros((size_out, size_in))
    rows = np.arange(size_out)
    matrix[rows, low] += 1 - fraction
    matrix[rows, np.minimum(low + 1, size_in - 1)] += fraction
    return matrix


def _traced_interpolation_matrix(
    size_in: convolutions.Dim, size_out: convolutions.Dim, align_corners: bool
) -> Float[Array, "out in"]:
    """Computes the `interpolation_matrix` of symbolic sizes, inside the program.

    The computation is in integers up to the one division, because float32 would displace centres
    far from the origin. int32 suffices for sizes whose product is at most 2^30.
    """
    rows, columns = jnp.arange(size_out)[:, None], jnp.arange(size_in)
    if align_corners:
        unit = jnp.maximum(size_out - 1, 1)
        centres = rows * (size_in - 1)
    else:
        unit = jnp.asarray(2 * size_out)
        centres = (2 * rows + 1) * size_in - size_out
    centres = jnp.clip(centres, 0, (size_in - 1) * unit)
    return jnp.maximum(unit - jnp.abs(centres - columns * unit), 0) / unit


def resize(
    x: Float[Array, "b h w c"], size: Sequence[convolutions.Dim], align_corners: bool = False
) -> Float[Array, "b oh ow c"]:
    """Bilinear resize of images, features or logits; the project's only implementation.

    The resize is two matrix products, which every backend runs well, forward and transposed. The
    precision is explicit because the TPU's default rounds float32 operands to bfloat16.

    Args:
        x: images of a float dtype; the result has the same dtype.
        size: (height, width) of the result, in pixels.
        align_corners: see `interpolation_matrix`.
    """
    for axis, (size_in, size_out) in enumerate(zip(x.shape[1:3], size, strict=True)):
        if size_in == size_out:
            continue
        symbolic = is_symbolic_dim(size_in) or is_symbolic_dim(size_out)
        weights = _traced_interpolation_matrix if symbolic else interpolation_matrix
        matrix = jnp.asarray(weights(size_in, size_out, align_corners), x.dtype)
        spec = "oh,bhwc->bowc" if axis == 0 else "ow,bhwc->bhoc"
        x = jnp.einsum(spec, matrix, x, precision=jax.lax.Precision.HIGHEST)
    return x
