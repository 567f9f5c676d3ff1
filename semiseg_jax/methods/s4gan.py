"""S4GAN: a discriminator of whole images, whose features are matched and whose score selects.

Source: Mittal et al., TPAMI 2021, the segmentation branch, and the published code
(sud0301/semisup-semseg, `train_s4GAN.py`). The second branch of the paper, a classifier of images
(MLMT), is not here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Key

from semiseg_jax.data.views import Views
from semiseg_jax.losses import IGNORE
from semiseg_jax.methods import (
    adversarial_losses,
    adversarial_method,
    confidence,
    consistency,
    discriminator,
)
from semiseg_jax.methods.adversarial_method import PASSED, AdversarialMethod, Examples
from semiseg_jax.methods.image_keys import image_keys
from semiseg_jax.methods.method import Batch, LabeledLoss, Outcome, State, mean
from semiseg_jax.methods.network import Network
from semiseg_jax.runtime import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4GAN(AdversarialMethod):
    """L = L_x + matching * L_fm + weight * L_st.

    L_fm is the distance between the batch means of the discriminator's features, of labels against
    predictions of unlabelled images; L_st is the cross-entropy with the network's own
    labels on the images whose probability of "real" is above the threshold, divided by the number
    of their pixels. The discriminator sees images too: the labelled and the unlabelled
    images of a step are each scaled by their own least and greatest level over the global batch.
    The published code scales the images of true labels by the greatest level of other labelled
    images. Labelled and unlabelled images have a pass each, and the weak norm.

    Attributes:
        weight: of L_st.
        matching: weight of L_fm.
    """

    weight: float
    matching: float
    views = Views(weak=1, strong=0)

    def init_params(self, key: Key[Array, ""], num_classes: int) -> Any:
        """See `AdversarialMethod.init_params`."""
        maps = jnp.zeros((1, 32, 32, num_classes + 3), jnp.float32)
        return discriminator.ImageDiscriminator().init(key, maps, image_keys(key, 1))["params"]

    def loss(
        self,
        network: Network,
        labeled_loss: LabeledLoss,
        state: State,
        batch: Batch,
        step: Integer[Array, ""],
        key: Key[Array, ""],
    ) -> Outcome:
        """See `OnlineMethod.loss`."""
        logits_labeled = network(batch.image, "weak")
        logits_weak = network(batch.weak, "weak")
        predicted = discriminator.predicted_map(logits_weak, batch.valid)
        fake = _with_images(predicted, batch.weak)
        real = _with_images(discriminator.true_map(batch.label, predicted), batch.image)
        params = state.discriminator.params
        scores, features = _apply(params, fake, jax.random.fold_in(key, 0))
        _, true_features = _apply(params, real, jax.random.fold_in(key, 1))
        is_labeled, is_seen = _counts(batch.label != IGNORE), _counts(batch.valid)

        labels = confidence.teacher_labels(logits_weak, batch.valid)
        passed = jax.nn.sigmoid(scores) > self.threshold
        # At the first step the discriminator is untrained; the published code skips it too.
        begun = adversarial_method.has_begun(step, max(self.first_step, 1))
        given = adversarial_method.passed_labels(labels, passed[:, None, None], begun)

        labeled = labeled_loss(logits_labeled, batch.label)
        matching = adversarial_losses.feature_matching(true_features, features, is_labeled, is_seen)
        own = mean(consistency.hard_cross_entropy(logits_weak, given))
        return Outcome(
            labeled + self.matching * matching + self.weight * own,
            {
                "loss_labeled": labeled,
                "loss_matching": matching,
                "loss_self_training": own,
                PASSED: jnp.sum(passed & is_seen) / jnp.maximum(jnp.sum(is_seen), 1),
            },
            *adversarial_method.count_pixels(given, labels, logits_weak.shape[-1]),
            examples=Examples(real, (fake,), batch.label != IGNORE, (batch.valid,)),
        )

    def discriminator_loss(
        self, params: Any, examples: Examples, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See `AdversarialMethod.discriminator_loss`; with channels dropped anew."""
        (fake,), (fake_valid,) = examples.fakes, examples.fake_valid
        of_fake, _ = _apply(params, fake, jax.random.fold_in(key, 2))
        of_real, _ = _apply(params, examples.real, jax.random.fold_in(key, 3))
        return adversarial_losses.discriminator_loss(
            of_real, (of_fake,), _counts(examples.real_valid), (_counts(fake_valid),)
        )


def _with_images(
    maps: Float[Array, "n h w classes"], images: Integer[Array, "n h w 3"]
) -> Float[Array, "n h w channels"]:
    """Class maps joined with the images they are of."""
    return jnp.concatenate([maps, discriminator.scale_images(images, maps.dtype)], axis=-1)


def _apply(
    params: Any, maps: Float[Array, "n h w channels"], key: Key[Array, ""]
) -> tuple[Float[Array, " n"], Float[Array, "n features"]]:
    keys = image_keys(key, maps.shape[0])
    return discriminator.ImageDiscriminator().apply({"params": params}, maps, keys)


def _counts(valid: Bool[Array, "n h w"]) -> Bool[Array, " n"]:
    """The images with a valid pixel; others tell the discriminator nothing."""
    return jnp.any(valid, axis=(1, 2))


RULES: dict[str, rules.Rule] = adversarial_method.RULES | {
    "weight": rules.number(0, 1e6),
    "matching": rules.number(0, 1e6),
}

# Values of the keys in workdirs of older code, which lack them; those of configs/default.py.
DEFAULTS: dict[str, Any] = adversarial_method.DEFAULTS | {
    "threshold": 0.6,
    "start": 0.0,
    "weight": 1.0,
    "matching": 0.1,
}
