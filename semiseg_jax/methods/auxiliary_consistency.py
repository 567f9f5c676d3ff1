"""The consistency loss between the auxiliary decoders of CCT and its main decoder.

The computation is in float32 for logits of any dtype (float64 for float64).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from semiseg_jax import losses
from semiseg_jax.methods.precision import at_least_float32


def auxiliary_consistency(
    auxiliary_logits: Sequence[Float[Array, "b h w classes"]],
    main_logits: Float[Array, "b h w classes"],
    valid: Bool[Array, "b h w"],
    weight: float | Float[Array, ""] = 30.0,
) -> Float[Array, ""]:
    """The consistency loss of CCT: weight times the mean over the auxiliary decoders.

    Source: Ouali et al., CVPR 2020, equations 2 and 3; yassouali/CCT, models/model.py. The main
    decoder gets no gradient, the encoder gets that of the auxiliary decoders.

    Args:
        auxiliary_logits: one array for each auxiliary decoder, of perturbed features.
        main_logits: of the features as they are, at the same size.
        valid: pixels that are not padding. A batch without any gives 0.
        weight: published: 30 times a ramp.
    """
    target = jax.nn.softmax(at_least_float32(main_logits), axis=-1)
    terms = [_squared_difference(logits, target, valid) for logits in auxiliary_logits]
    total = jnp.sum(jnp.stack([total for total, _ in terms]))
    return weight * total / (len(terms) * jnp.maximum(terms[0][1], 1))


def _squared_difference(
    logits: Float[Array, "*pixels classes"],
    target: Float[Array, "*pixels classes"],
    valid: Bool[Array, "*pixels"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared difference of probabilities, as (sum, count) over the valid pixels.

    The loss of a pixel is the mean over the classes, not the sum (yassouali/CCT, utils/losses.py,
    `softmax_mse_loss`: PyTorch's mean over images, classes and pixels).

    Args:
        logits: of the perturbed prediction.
        target: probabilities, or a constant.
        valid: pixels that take part.
    """
    probabilities = jax.nn.softmax(at_least_float32(logits), axis=-1)
    difference = probabilities - jax.lax.stop_gradient(target)
    return losses.masked_sum(jnp.mean(difference**2, axis=-1), valid)
