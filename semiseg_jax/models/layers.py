"""Layers that the networks share: convolution with norm, separable convolution, resizing."""

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
from semiseg_jax.models.dsbn import MOMENTS, Batch, DomainNorm

# A partially applied DomainNorm: what differs between networks is bound where they are built.
NormFactory = Callable[..., DomainNorm]
Activation = Callable[[jax.Array], jax.Array]
# How the first block of a stage is dilated; see `dilated_stages`.
FirstDilation = Literal["previous", "stage"]
FIRST_DILATIONS = ("previous", "stage")

# He et al. (ICCV 2015), equation 14. Of a depthwise kernel [k, k, 1, c] each output feeds from one
# channel alone and each input into one: both fans are k * k, which flax knows as its "in".
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
DEPTHWISE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Conv(nn.Module):
    """Convolution without bias unless asked; kernel [k, k, in / groups, features] float32.

    Attributes:
        features: output channels.
        kernel_size: side of the square kernel, in pixels.
        stride: step in pixels, the same both ways.
        dilation: distance between kernel taps, in pixels.
        depthwise: one filter a channel; `features` must equal the input channels.
        padding: "torch" (dilation * (k - 1) / 2 on each side), "same" (TensorFlow's) or explicit;
            see `convolutions.conv2d`.
        use_bias: add a bias [features].
        kernel_init: draws the kernel; None for He's, by what kind of kernel it is.
        dtype: of the computation; None for that of input and kernel together.
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
    """Convolution, then the domains' norm, then the activation if there is one.

    Attributes:
        features, kernel_size, stride, dilation, depthwise, padding: see `Conv`.
        norm: makes the norm.
        activation: after the norm; None for none.
        dtype: of the computation; None for that of input and parameters together.
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
        self, x: Float[Array, "b h w c"], batch: Batch
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
        x = self.norm(name="norm")(x, batch)
        return x if self.activation is None else self.activation(x)


class SeparableConvNorm(nn.Module):
    """Depthwise then pointwise convolution, a norm and an activation after each.

    Source: DeepLabV3+ (Chen et al., ECCV 2018), section 3.2, atrous separable convolution.

    Attributes:
        features: output channels.
        norm: makes the norms.
        kernel_size, stride, dilation: of the depthwise convolution, in pixels.
        activation: after each norm; None for none.
        norm_between: whether the depthwise convolution has norm and activation of its own;
            without them the two convolutions are one linear map.
        dtype: of the computation; None for that of input and parameters together.
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
        self, x: Float[Array, "b h w c"], batch: Batch
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
            x = ConvNorm(x.shape[-1], self.norm, activation=self.activation, **depthwise)(x, batch)
        else:
            x = Conv(x.shape[-1], **depthwise)(x)
        return ConvNorm(
            self.features,
            self.norm,
            activation=self.activation,
            dtype=self.dtype,
            name="pointwise",
        )(x, batch)


class Dropout(nn.Module):
    """Drops features in training, by a key of each image's own.

    So that what is dropped follows from an image's place in its stream, and not from how many
    devices the streams are joined for.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], batch: Batch) -> Float[Array, "b h w c"]:
        """x with a share `rate` of its features 0 and the others scaled up."""
        if self.rate == 0 or not batch.train:
            return x
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            self.make_rng("dropout"), jnp.asarray(batch.places(x.shape[0]), jnp.uint32)
        )
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def rematerialized(block: type[nn.Module], wanted: bool) -> Callable[..., Callable[..., Any]]:
    """The block (called with x and batch), its activations made again in the backward pass.

    What a block computes inside is then not kept from the forward pass, but for the moments of its
    norms; its input is.
    """
    keep = jax.checkpoint_policies.save_only_these_names(MOMENTS)
    return nn.remat(block, static_argnums=(2,), policy=keep) if wanted else block


class Stage(NamedTuple):
    """Where a stage samples, in pixels of its input.

    Attributes:
        stride: of its strided convolution.
        dilation: of its strided convolution, and of those before it in the block.
        dilation_after: of every convolution after that.
    """

    stride: int
    dilation: int
    dilation_after: int


def dilated_stages(
    strides: Sequence[int],
    reached: int,
    output_stride: int,
    first_dilation: FirstDilation = "previous",
) -> list[Stage]:
    """Stages whose stride is traded for dilation where they would pass the output stride.

    Source: DeepLab (Chen et al., 2017), section 3.1.

    Args:
        strides: of the stages as published.
        reached: stride of what enters the first of them.
        output_stride: of what shall leave the last.
        first_dilation: "previous" leaves the convolution whose stride was taken at the dilation
            before it, so that the dilated network computes what the strided one does, on more
            pixels (torchvision, timm, TensorFlow's DeepLab); "stage" dilates it as all that
            follow (segmentation_models_pytorch).
    """
    stages, dilation = [], 1
    for stride in strides:
        first = dilation
        if reached * stride > output_stride:
            dilation, stride = dilation * stride, 1
        reached *= stride
        stages.append(Stage(stride, first if first_dilation == "previous" else dilation, dilation))
    return stages


def interpolation_matrix(
    size_in: int, size_out: int, align_corners: bool = False
) -> Float[np.ndarray, "out in"]:
    """Weights of one-dimensional linear interpolation; each row sums to 1.

    Half-pixel centres without antialiasing: output i lies at (i + .5) * in / out - .5, clamped
    to the image. With `align_corners` the first and last centres of both sizes coincide.
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
    """The same where a size is symbolic: made by the program itself, once it knows the sizes.

    Integers up to the one division, so that float32 does not displace centres far from the origin;
    int32 holds them up to sizes whose product is 2^30.
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
    """Bilinear resize of images, features or logits; the one place where that is done.

    Separable matrix products: every backend runs them well, forward and transposed. Full
    precision is asked for because the TPU's default rounds float32 operands to bfloat16.

    Args:
        x: images of a float dtype, which the result keeps.
        size: (height, width) of the result, in pixels.
        align_corners: see `interpolation_matrix`.
    """
    for axis, (size_in, size_out) in enumerate(zip(x.shape[1:3], size, strict=True)):
        if size_in == size_out:
            continue
        symbolic = is_symbolic_dim(size_in) or is_symbolic_dim(size_out)
        make = _traced_interpolation_matrix if symbolic else interpolation_matrix
        matrix = jnp.asarray(make(size_in, size_out, align_corners), x.dtype)
        spec = "oh,bhwc->bowc" if axis == 0 else "ow,bhwc->bhoc"
        x = jnp.einsum(spec, matrix, x, precision=jax.lax.Precision.HIGHEST)
    return x
