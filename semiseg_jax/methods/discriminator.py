"""Discriminators: networks that tell the label maps of people from those of a segmenter.

Sources: AdvSemiSeg (Hung et al., BMVC 2018), `model/discriminator.py` of hfslyc/AdvSemiSeg; S4GAN
(Mittal et al., TPAMI 2021), `model/discriminator.py` of sud0301/semisup-semseg. The published
initial biases are PyTorch's, uniform; here they are 0. Where a convolution meets an odd side, it is
padded on the right and below; the published ones leave out the last row and column there. For
crops whose sides are multiples of 32 both are one.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, Key

from semiseg_jax.methods import channel_dropout
from semiseg_jax.methods.precision import at_least_float32
from semiseg_jax.models import layers

# Channels of the four convolutions that both networks have.
FEATURES = (64, 128, 256, 512)

# The kernels of PyTorch's layers: uniform within 1 / sqrt(fan_in).
KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

_leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)


class PixelDiscriminator(nn.Module):
    """AdvSemiSeg's: fully convolutional, a logit for each pixel."""

    @nn.compact
    def __call__(self, maps: Float[Array, "n h w channels"]) -> Float[Array, "n h w"]:
        """Computes for each pixel the logit of "this is the label map of a person".

        The logits of the last convolution, one for 32x32 pixels, are enlarged to the size of the
        map with aligned corners, as published.

        Args:
            maps: from `class_map`.
        """
        x = maps
        for number, features in enumerate(FEATURES, start=1):
            x = _leaky_relu(_convolve(x, features, f"conv{number}"))
        logits = _convolve(x, 1, "conv5")
        return layers.resize(logits, maps.shape[1:3], align_corners=True)[..., 0]


class ImageDiscriminator(nn.Module):
    """S4GAN's: a logit for each image, from the means of its last features."""

    @nn.compact
    def __call__(
        self, maps: Float[Array, "n h w channels"], keys: Key[Array, " n"]
    ) -> tuple[Float[Array, " n"], Float[Array, "n features"]]:
        """Computes (the logit of each image, the features whose batch means are matched).

        Channels are dropped (rate .5) after each of the first three convolutions, in both updates,
        as published.

        Args:
            maps: from `class_map`, joined with the image from `scale_images`.
            keys: of the dropout, one for each image, from `image_keys`.
        """
        x = maps
        for number, features in enumerate(FEATURES, start=1):
            x = _leaky_relu(_convolve(x, features, f"conv{number}"))
            if number < len(FEATURES):
                folded = jax.vmap(functools.partial(jax.random.fold_in, data=number))(keys)
                x = channel_dropout.channel_dropout(folded, x)
        pooled = jnp.mean(x, axis=(1, 2))
        logits = nn.Dense(1, kernel_init=KERNEL_INIT, name="score")(pooled)
        return logits[:, 0], pooled


def _convolve(x: Float[Array, "n h w c"], features: int, name: str) -> Float[Array, "n oh ow o"]:
    """A 4x4 convolution with stride 2."""
    return nn.Conv(
        features, (4, 4), (2, 2), padding="SAME", kernel_init=KERNEL_INIT, dtype=None, name=name
    )(x)


def class_map(
    probabilities: Float[Array, "n h w classes"], valid: Bool[Array, "n h w"]
) -> Float[Array, "n h w classes"]:
    """What a discriminator sees of a prediction: probabilities, 0 for each class where not valid.

    The published code has zeros where a true label is ignored, and predictions there in the map of
    the segmenter, by which the two are told apart. Here ignored pixels are zeros in both.

    Args:
        probabilities: softmax of the segmenter, or the labels as one-hot vectors.
        valid: false at padding and where the label is ignored.
    """
    return jnp.where(valid[..., None], probabilities, 0)


def predicted_map(
    logits: Float[Array, "n h w classes"], valid: Bool[Array, "n h w"]
) -> Float[Array, "n h w classes"]:
    """The class map of a prediction, float32 or float64."""
    return class_map(jax.nn.softmax(at_least_float32(logits), axis=-1), valid)


def true_map(
    labels: Integer[Array, "n h w"], like: Float[Array, "m h w classes"]
) -> Float[Array, "n h w classes"]:
    """The class map of true labels; zeros where a label is ignored.

    Args:
        labels: class ids, or IGNORE.
        like: a predicted map, of which classes and dtype are taken.
    """
    return jax.nn.one_hot(labels, like.shape[-1], dtype=like.dtype)


def scale_images(images: Integer[Array, "n h w 3"], dtype: DTypeLike) -> Float[Array, "n h w 3"]:
    """Scales the levels of a batch to 0..1 by its least and its greatest level; 0 if all are one.

    Args:
        images: of the global batch, uint8.
        dtype: of the result.
    """
    levels = images.astype(dtype)
    least, greatest = jnp.min(levels), jnp.max(levels)
    # Levels are whole numbers: where they differ, they differ by 1 at least.
    return (levels - least) / jnp.maximum(greatest - least, 1)
