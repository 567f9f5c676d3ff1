"""Perturbations of features for cross-consistency training (CCT).

Source: Ouali et al., CVPR 2020, section 3.3; yassouali/CCT, models/decoders.py. Guided cutout is in
`guided_cutout`, virtual adversarial training in `virtual_adversarial`. The dropout of channels is
that of UniMatch.

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
    features: Float[Array, "b h w c"],
    keys: Key[Array, "*b"],
    low: float = 0.7,
    high: float = 0.9,
    valid: Bool[Array, "b h w"] | None = None,
) -> Float[Array, "b h w c"]:
    """Sets the most active positions of each image to 0: "Feature Drop", F-Drop.

    A position is dropped where its mean over the channels is at least gamma times the largest mean
    of the image, with gamma from U(low, high).

    Args:
        features: of the encoder, 0 or above.
        keys: see the module.
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
    features: Float[Array, "b h w c"], keys: Key[Array, "*b"], limit: float = 0.3
) -> Float[Array, "b h w c"]:
    """Returns features * (1 + noise) with noise from U(-limit, limit): "Feature Noise", F-Noise.

    Args:
        features: of the encoder.
        keys: see the module.
        limit: largest noise.
    """
    shape = features.shape[1:]
    noise = _draw(keys, lambda key: jax.random.uniform(key, shape, jnp.float32, -limit, limit))
    return (at_least_float32(features) * (1 + noise)).astype(features.dtype)


def mask_context(
    features: Float[Array, "b h w c"], objects: Bool[Array, "b oh ow"]
) -> Float[Array, "b h w c"]:
    """Hides the context: only the features of objects remain ("Con-Msk").

    Args:
        features: of the encoder.
        objects: from `masks.predicted_objects`, at any size.
    """
    objects = masks.resize_nearest(objects, features.shape[1:3])
    return jnp.where(objects[..., None], features, 0)


def mask_objects(
    features: Float[Array, "b h w c"], objects: Bool[Array, "b oh ow"]
) -> Float[Array, "b h w c"]:
    """Hides the objects: only the features of the context remain ("Obj-Msk").

    Args:
        features: of the encoder.
        objects: from `masks.predicted_objects`, at any size.
    """
    return mask_context(features, ~objects)


def cut_out(
    features: Float[Array, "b h w c"], keep: Bool[Array, "b oh ow"]
) -> Float[Array, "b h w c"]:
    """Sets the features of cut pixels to 0.

    Args:
        features: of the encoder.
        keep: from `guided_cutout.keep_mask`, at any size.
    """
    return mask_context(features, keep)


def _draw(keys: Key[Array, "*b"], sample: Callable[[Array], Array]) -> Array:
    """Draws [b, ...] with one key for each image, or [1, ...] with a single key."""
    return jax.vmap(sample)(jnp.atleast_1d(keys))
