"""Virtual adversarial perturbation of features (VAT), as in cross-consistency training (CCT).

Sources: Miyato et al., 2017 (arXiv 1704.03976), section 3.3; Ouali et al., CVPR 2020, section 3.3;
yassouali/CCT, models/decoders.py, `get_r_adv`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from semiseg_jax.methods.precision import at_least_float32

Decoder = Callable[[Array], Array]


def perturb(
    keys: Key[Array, " n"],
    decoder: Decoder,
    features: Float[Array, "n h w c"],
    **kwargs: Any,
) -> Float[Array, "n h w c"]:
    """Adds `perturbation` to the features, from a start in [-.5, .5] that is drawn for each image.

    Args:
        keys: one for each image, from `image_keys`.
        decoder: see `perturbation`.
        features: of the encoder, of any float dtype.
        kwargs: go to `perturbation`: xi, eps, iterations, norm_floor, linearized, valid.

    Returns:
        The perturbed features in float32 (float64 for float64), because bfloat16 cannot hold the
        sum. The gradient passes to the features, and not through the perturbation.
    """
    features = at_least_float32(features)
    shape = features.shape[1:]
    draw = jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32, -0.5, 0.5))
    return features + perturbation(decoder, features, draw(keys), **kwargs)


def perturbation(
    decoder: Decoder,
    features: Float[Array, "n h w c"],
    start: Float[Array, "n h w c"],
    xi: float = 1e-6,
    eps: float = 2.0,
    iterations: int = 1,
    norm_floor: float = 0.0,
    linearized: bool = True,
    valid: Bool[Array, "n oh ow"] | None = None,
) -> Float[Array, "n h w c"]:
    """Returns the perturbation of length `eps` that changes the prediction of an image most.

    The start, scaled to length 1, is a direction d. The gradient of the divergence
    KL(softmax(decoder(x)), softmax(decoder(x + xi d))) with respect to d, scaled to length 1, is
    the next direction.

    The published step of 1e-6, over the thousands of features of an image, is below the resolution
    of float32. By default the gradient is therefore linearised: xi^2 J^T F J d, with the Jacobian J
    of the decoder and the Fisher matrix F = diag(p) - p p^T of the softmax. It is the limit of the
    published gradient for small xi, without its rounding.

    The length is eps for any xi and any number of images, as both papers have it. The published
    code adds 1e-8 to a length before it divides by it (`norm_floor`), and divides the divergence
    by the number of images. The gradient is proportional to xi^2, and with xi = 1e-6 it is shorter
    than that floor: for random features of 10x10x512, 10 images and 21 classes the published
    function returns a length of 8e-4 in float32 and of 9e-5 in float64, and not eps = 2.

    Args:
        decoder: features to logits, for each image on its own; it must compute in the dtype of its
            input, such as an `AuxiliaryDecoder` with dtype None, and have a forward-mode
            derivative, unless `linearized` is False. In CCT it is the auxiliary decoder that then
            predicts from the result.
        features: of the encoder, of any float dtype.
        start: a random direction of any length.
        xi: length of the step at which the gradient is taken.
        eps: length of the perturbation.
        iterations: of the power method.
        norm_floor: added to lengths before dividing by them; published: 1e-8.
        linearized: False for the finite step xi, for steps that float32 resolves, such as .1.
        valid: pixels of the logits that are not padding; only they count in the divergence.

    Returns:
        The perturbation in float32 (float64 for float64 features), without gradient.
    """
    fixed = jax.lax.stop_gradient(features)
    fixed = at_least_float32(fixed)
    gradient = _linearized_gradient if linearized else _finite_step_gradient
    direction = _unit(start.astype(fixed.dtype), norm_floor)
    for _ in range(iterations):
        raw = gradient(decoder, fixed, direction, xi, valid) / fixed.shape[0]
        direction = _unit(raw, norm_floor)
    return eps * jax.lax.stop_gradient(direction)


def _finite_step_gradient(
    decoder: Decoder, x: Array, direction: Array, xi: float, valid: Array | None
) -> Array:
    """The gradient of the divergence, summed over images and pixels, at the step xi."""
    log_p = jax.nn.log_softmax(decoder(x), axis=-1)

    def divergence(direction: Array) -> Array:
        log_q = jax.nn.log_softmax(decoder(x + xi * direction), axis=-1)
        by_pixel = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return jnp.sum(by_pixel if valid is None else jnp.where(valid, by_pixel, 0))

    return jax.grad(divergence)(direction)


def _linearized_gradient(
    decoder: Decoder, x: Array, direction: Array, xi: float, valid: Array | None
) -> Array:
    """The same to first order in xi: xi^2 J^T F J d."""
    logits, change = jax.jvp(decoder, (x,), (direction,))
    _, pull_back = jax.vjp(decoder, x)
    p = jax.nn.softmax(logits, axis=-1)
    difference = p * (change - jnp.sum(p * change, axis=-1, keepdims=True))
    if valid is not None:
        difference = jnp.where(valid[..., None], difference, 0)
    (gradient,) = pull_back(difference.astype(logits.dtype))
    return xi * xi * gradient


def _unit(x: Float[Array, "n h w c"], floor: float) -> Float[Array, "n h w c"]:
    """Divides each image by its length plus the floor; an image of zeros stays 0."""
    # The largest value first: squares of values below 1e-19 are 0 in float32.
    largest = jnp.max(jnp.abs(x), axis=(1, 2, 3), keepdims=True)
    scaled = x / jnp.where(largest > 0, largest, 1)
    length = jnp.sqrt(jnp.sum(scaled**2, axis=(1, 2, 3), keepdims=True))
    return scaled / jnp.where(largest > 0, length + floor / jnp.where(largest > 0, largest, 1), 1)
