"""Perturbations of features for cross-consistency training (CCT).

Source: Ouali et al., CVPR 2020, section 3.3; yassouali/CCT, models/decoders.py. Guided cutout is in
`guided_cutout`, virtual adversarial training in `virtual_adversarial`, and the dropout of channels
in `channel_dropout`.

Random perturbations take `keys`: one key for each image, so that an image is perturbed alike on any
number of devices; or a single key (shape []), which draws once for the whole batch. The published
code draws the threshold of feature drop and the tensor of feature noise once for the batch; the
paper, and this project, for each image.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from semiseg_jax.methods import masks
from semiseg_jax.methods.precision import at_least_float32


def drop_attended(
    keys: Key[Array, "*n"],
    features: Float[Array, "n h w c"],
    low: float = 0.7,
    high: float = 0.9,
    valid: Bool[Array, "n h w"] | None = None,
) -> Float[Array, "n h w c"]:
    """Sets the most active positions of each image to 0: "Feature Drop", F-Drop.

    A position is dropped where its mean over the channels is at least gamma times the largest mean
    of the image, with gamma from U(low, high).

    Args:
        keys: see the module.
        features: of the encoder, 0 or above.
        low, high: range of gamma.
        valid: positions that are not padding; the largest mean is that of a valid position.
    """
    attention = jnp.mean(at_least_float32(features), axis=-1, keepdims=True)
    attention = jax.lax.stop_gradient(attention)
    gamma = _draw(keys, lambda key: jax.random.uniform(key, (1, 1, 1), jnp.float32, low, high))
    counted = attention if valid is None else jnp.where(valid[..., None], attention, 0)
    largest = jnp.max(counted, axis=(1, 2, 3), keepdims=True)
    return jnp.where(attention < largest * gamma, features, 0)


def add_noise(
    keys: Key[Array, "*n"], features: Float[Array, "n h w c"], limit: float = 0.3
) -> Float[Array, "n h w c"]:
    """Returns features * (1 + noise) with noise from U(-limit, limit): "Feature Noise", F-Noise.

    Args:
        keys: see the module.
        features: of the encoder.
        limit: largest noise.
    """
    shape = features.shape[1:]
    noise = _draw(keys, lambda key: jax.random.uniform(key, shape, jnp.float32, -limit, limit))
    return (at_least_float32(features) * (1 + noise)).astype(features.dtype)


def keep_positions(
    features: Float[Array, "n h w c"], keep: Bool[Array, "n oh ow"]
) -> Float[Array, "n h w c"]:
    """Sets the features outside a mask to 0.

    Three perturbations of CCT differ in the mask alone: the objects hide the context ("Con-Msk"),
    ~objects hide the objects ("Obj-Msk"), and `guided_cutout.keep_mask` cuts out ("G-Cutout").

    Args:
        features: of the encoder.
        keep: at any size; such as `masks.predicted_objects`.
    """
    keep = masks.resize_nearest(keep, features.shape[1:3])
    return jnp.where(keep[..., None], features, 0)


def _draw(keys: Key[Array, "*n"], sample: Callable[[Array], Array]) -> Array:
    """Draws [n, ...] with one key for each image, or [1, ...] with a single key."""
    return jax.vmap(sample)(jnp.atleast_1d(keys))
