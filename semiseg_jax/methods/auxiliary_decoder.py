"""The small decoder of cross-consistency training (CCT), for main and auxiliary predictions.

Source: Ouali et al., CVPR 2020, section 3.2; yassouali/CCT, models/decoders.py, `upsample`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# PyTorch's kaiming_normal_: He et al. (ICCV 2015), equation 10.
PROJECTION_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class AuxiliaryDecoder(nn.Module):
    """A 1x1 convolution to the classes, then doublings of the size by pixel shuffle.

    The published initial biases are PyTorch's, uniform; here they are 0.

    Attributes:
        num_classes: C.
        upscale: size of the logits over that of the features, a power of 2. 8 for features of
            stride 8, as published; the caller resizes the logits to the size of the image.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    num_classes: int
    upscale: int = 8
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, features: Float[Array, "n h w c"]) -> Float[Array, "n oh ow classes"]:
        """Computes logits at `upscale` times the size of the features."""
        doublings = self.upscale.bit_length() - 1
        if self.upscale != 2**doublings:
            raise ValueError(f"upscale is {self.upscale}, but must be a power of 2.")
        # A 1x1 convolution is linear in the channels, and has a forward-mode derivative this way.
        x = nn.Dense(
            self.num_classes,
            use_bias=False,
            kernel_init=PROJECTION_INIT,
            dtype=self.dtype,
            name="project",
        )(features)
        for i in range(doublings):
            x = nn.Dense(
                4 * self.num_classes,
                kernel_init=_equal_subpixels,
                dtype=self.dtype,
                name=f"enlarge{i + 1}",
            )(x)
            x = pixel_shuffle(nn.relu(x))
        return x


def pixel_shuffle(x: Float[Array, "n h w c"], scale: int = 2) -> Float[Array, "n oh ow oc"]:
    """Rearranges scale^2 neighbouring channels as a square of scale x scale pixels.

    Channel c * scale^2 + i * scale + j becomes row i, column j of channel c (PyTorch's order).
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // scale**2, scale, scale)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, height * scale, width * scale, channels // scale**2)


def _equal_subpixels(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Initialises the four kernels of a class alike, against checkerboards (ICNR)."""
    kernel = PROJECTION_INIT(key, (*shape[:-1], shape[-1] // 4), dtype)
    return jnp.repeat(kernel, 4, axis=-1)
