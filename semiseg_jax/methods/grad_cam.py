"""Grad-CAM: maps of the positions that speak for each class of an image-level classifier.

Sources: Selvaraju et al., ICCV 2017, equations 1 and 2; googleinterns/wss,
core/train_utils_core.py, `compute_cam_v2`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from semiseg_jax.methods.precision import at_least_float32


def grad_cam(
    classifier: Callable[[Array], Array],
    features: Float[Array, "n h w c"],
    present: Bool[Array, "n outputs"],
    valid: Bool[Array, "n h w"] | None = None,
) -> Float[Array, "n h w outputs"]:
    """Computes the class maps of each image, from 0 to 1, without gradient.

    The map of a class is relu(sum over channels of weight * feature), where the weight of a channel
    is the mean over the positions of the image of the gradient of the class's logit. Each map is
    divided by its largest value (by 1e-5 where that is smaller), and is 0 for absent classes.

    The published code averages the gradients over the images and rows instead, by the axes of an
    array with a leading dimension. For a linear classifier on the mean of the features it is the
    same, because the gradient is the same at every position of every image.

    Args:
        classifier: features to logits [n, outputs], for each image on its own, without dropout.
        features: of the last layer of the backbone.
        present: the classes of each image: `masks.classes_in_labels` where there are labels, else
            `image_classifier.predicted_classes`.
        valid: positions that are not padding; the maps are 0 elsewhere.
    """
    features = at_least_float32(features)
    features = jax.lax.stop_gradient(features)
    logits, pull_back = jax.vjp(classifier, features)
    outputs = logits.shape[-1]

    def weights(output: Array) -> Array:
        one_hot = jnp.broadcast_to(jnp.arange(outputs) == output, logits.shape)
        (gradient,) = pull_back(one_hot.astype(logits.dtype))
        return jnp.mean(gradient, axis=(1, 2))

    # One class after the other: gradients of all classes at once need C times the features' memory.
    by_class = jax.lax.map(weights, jnp.arange(outputs))
    maps = jnp.einsum("bhwc,kbc->bhwk", features, by_class, precision=jax.lax.Precision.HIGHEST)
    maps = jnp.maximum(maps, 0) * present[:, None, None]
    if valid is not None:
        maps = maps * valid[..., None]
    largest = jnp.max(maps, axis=(1, 2), keepdims=True)
    return jax.lax.stop_gradient(maps / jnp.maximum(largest, 1e-5))
