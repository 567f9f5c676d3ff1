"""Losses of segmenter and discriminator against each other, on logits of the discriminator.

Each loss returns `(sum, count)`, as in `semiseg_jax.losses`, so that the caller divides once, over
the global batch. What is not valid, a pixel or an image, counts nowhere.

Sources: AdvSemiSeg (Hung et al., BMVC 2018), adversarial losses; S4GAN (Mittal et al., TPAMI 2021),
its feature matching, `train_s4GAN.py`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from semiseg_jax import losses
from semiseg_jax.methods.method import mean
from semiseg_jax.methods.precision import at_least_float32


def real_cross_entropy(
    logits: Float[Array, "*shape"], valid: Bool[Array, "*shape"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """-log sigmoid(logits): binary cross-entropy with the answer "real", as (sum in nats, count).

    The segmenter has it on its own predictions, the discriminator on true labels. It is computed
    from the logits: its gradient does not vanish where a sigmoid rounds to 0.

    Args:
        logits: of the discriminator, of any float dtype; reduced in float32.
        valid: those that count.
    """
    return losses.masked_sum(jax.nn.softplus(-at_least_float32(logits)), valid)


def fake_cross_entropy(
    logits: Float[Array, "*shape"], valid: Bool[Array, "*shape"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """-log(1 - sigmoid(logits)): binary cross-entropy with the answer "fake"; see above."""
    return losses.masked_sum(jax.nn.softplus(at_least_float32(logits)), valid)


def feature_matching(
    real: Float[Array, "n features"],
    fake: Float[Array, "m features"],
    real_counts: Bool[Array, " n"],
    fake_counts: Bool[Array, " m"],
) -> Float[Array, ""]:
    """The mean distance between the batch means of the discriminator's features (S4GAN).

    Args:
        real: features of true labels; no gradient passes.
        fake: of the predictions.
        real_counts, fake_counts: images that have a valid pixel; 0 where no image has one.
    """

    def batch_mean(features: Float[Array, "k features"], counts: Bool[Array, " k"]) -> Array:
        total = jnp.sum(jnp.where(counts[:, None], features, 0), axis=0)
        return total / jnp.maximum(jnp.sum(counts), 1)

    difference = batch_mean(jax.lax.stop_gradient(real), real_counts) - batch_mean(
        fake, fake_counts
    )
    either = jnp.any(real_counts) & jnp.any(fake_counts)
    return jnp.where(either, jnp.mean(jnp.abs(difference)), 0)


def discriminator_loss(
    real: Float[Array, "*shape"],
    fakes: tuple[Float[Array, "..."], ...],
    real_valid: Bool[Array, "*shape"],
    fake_valid: tuple[Bool[Array, "..."], ...],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(half the loss on true labels + half the loss on predictions, metrics of the step).

    The metrics are the loss and the accuracies on true labels and on predictions: how often the
    logit has the right sign.

    Args:
        real: logits of true labels.
        fakes: logits of predictions; all of them have one mean.
        real_valid, fake_valid: those that count.
    """
    parts = [fake_cross_entropy(x, valid) for x, valid in zip(fakes, fake_valid, strict=True)]
    of_fakes = mean(_added(parts))
    loss = (mean(real_cross_entropy(real, real_valid)) + of_fakes) / 2
    right = [_right(x < 0, valid, x.dtype) for x, valid in zip(fakes, fake_valid, strict=True)]
    return loss, {
        "loss_discriminator": loss,
        "accuracy_real": mean(_right(real > 0, real_valid, real.dtype)),
        "accuracy_fake": mean(_added(right)),
    }


def _added(
    parts: Sequence[tuple[Float[Array, ""], Float[Array, ""]]],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sums of several passes as one (sum, count)."""
    totals, counts = (jnp.stack(column) for column in zip(*parts, strict=True))
    return jnp.sum(totals), jnp.sum(counts)


def _right(
    answers: Bool[Array, "*shape"], valid: Bool[Array, "*shape"], dtype: DTypeLike
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return losses.masked_sum(answers.astype(dtype), valid)
