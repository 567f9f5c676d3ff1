"""A backbone and a head, whatever they are: encoding, decoding, and the size of the result."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Num

from semiseg_jax.models import convolutions, dsbn, layers

# (height, width) in pixels.
Size = tuple[convolutions.Dim, convolutions.Dim]


@flax.struct.dataclass
class Features:
    """The result of `Segmenter.encode`: a pytree of feature maps, and the size of the input.

    Attributes:
        low: the first features that the head reads, [b, h, w, c]; of a convolutional backbone at
            stride 4.
        high: the last features, at the output stride, [b, h, w, c].
        size: (height, width) of the images, in pixels; static.
        stride: of "high", in pixels of the images as the network sees them; static.
        middle: features between them, () for convolutional backbones.
    """

    low: Any
    high: Any
    size: Size = flax.struct.field(pytree_node=False)
    stride: int = flax.struct.field(pytree_node=False)
    middle: tuple[Any, ...] = ()


class Segmenter(nn.Module):
    """A backbone and a head; subclasses define the head in `_head`.

    `encode` computes the backbone's features and `decode` the logits from them, so that a caller
    can change the features in between or decode them by another head:

        features = model.apply(variables, images, domain="strong", method="encode")
        logits = model.apply(variables, features, domain="strong", method="decode")

    Attributes:
        backbone: returns {"low": the first features, "high": the last}, and "middle" with four.
        num_classes: C.
        mean, std: input normalisation, for RGB values 0..255.
        align_corners: see `layers.interpolation_matrix`; for every resize in the network.
        freeze_backbone: no gradient reaches the backbone, and training changes neither its norm
            statistics nor, by dropout, its features.
        remat: recompute activations inside the head in the backward pass too.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    backbone: nn.Module
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    align_corners: bool
    freeze_backbone: bool
    remat: bool
    dtype: DTypeLike | None

    def __call__(
        self,
        images: Num[ArrayLike, "b h w 3"],
        domain: dsbn.Domain = "weak",
        groups: int = 1,
        train: bool = False,
        num_weak: int | None = None,
    ) -> Float[Array, "b h w classes"]:
        """Computes logits at the size of the images, in the compute dtype.

        Args:
            images: RGB; uint8 images are normalised here, float images must be normalised already.
            domain: the norm of the images; "both" for blocks of weak and strong images.
            groups: with "both", the number of equal blocks (see `dsbn.DomainLayout`).
            train: use batch statistics and dropout; the statistics collections must be mutable,
                and a dropout rate other than 0 needs a `dropout` key.
            num_weak: with "both", the number of weak images in each block; None for half of it.
        """
        features = self.encode(images, domain, groups, train, num_weak)
        return self.decode(features, domain, groups, train, num_weak)

    def encode(
        self,
        images: Num[ArrayLike, "b h w 3"],
        domain: dsbn.Domain = "weak",
        groups: int = 1,
        train: bool = False,
        num_weak: int | None = None,
    ) -> Features:
        """Computes the backbone's features; arguments as for `__call__`."""
        train = train and not self.freeze_backbone
        layout = dsbn.DomainLayout(domain, train, groups, num_weak)
        images = jnp.asarray(images)
        x = normalize(images, self.mean, self.std)
        x = x if self.dtype is None else x.astype(self.dtype)
        size = images.shape[1:3]
        x = layers.resize(x, self._network_size(size), self.align_corners)
        features = self.backbone(x, layout)
        if self.freeze_backbone:
            # The backward pass ends here: no activations of the backbone are stored for it.
            features = jax.lax.stop_gradient(features)
        return Features(size=size, stride=self._stride(), **features)

    @nn.compact
    def decode(
        self,
        features: Features,
        domain: dsbn.Domain = "weak",
        groups: int = 1,
        train: bool = False,
        num_weak: int | None = None,
    ) -> Float[Array, "b h w classes"]:
        """Computes logits at the size of the images from features, in the compute dtype.

        Args:
            features: from `encode`, changed or not. Their batch need not be that of the images: the
                other arguments describe the batch of the features.
            domain, groups, train, num_weak: as for `__call__`.
        """
        logits = self._head(features, dsbn.DomainLayout(domain, train, groups, num_weak))
        logits = layers.resize(logits, self._network_size(features.size), self.align_corners)
        return layers.resize(logits, features.size, self.align_corners)

    def _head(self, features: Features, layout: dsbn.DomainLayout) -> Float[Array, "b h w classes"]:
        """Computes logits at any resolution; its submodules belong to the scope of `decode`."""
        raise NotImplementedError

    def _stride(self) -> int:
        """Returns the stride of the last features."""
        raise NotImplementedError

    def _network_size(self, size: Size) -> Size:
        """Returns the size to which images are resized for the backbone: their own."""
        return size

    def _classifier(self, kernel_size: int, dilation: int, name: str) -> layers.Conv:
        return layers.Conv(
            self.num_classes,
            kernel_size,
            dilation=dilation,
            use_bias=True,
            kernel_init=nn.initializers.normal(0.01),
            dtype=self.dtype,
            name=name,
        )


def normalize(
    images: Num[ArrayLike, "b h w 3"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "b h w 3"]:
    """Returns (image - mean) / std for uint8 images, and float images unchanged."""
    images = jnp.asarray(images)
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    scale = 1.0 / np.asarray(std, np.float32)
    return (images.astype(jnp.float32) - np.asarray(mean, np.float32)) * scale
