"""AdvSemiSeg: a discriminator of label maps, which says where the segmenter is to trust itself.

Source: Hung et al., BMVC 2018, section 3 and the published code (hfslyc/AdvSemiSeg, `train.py`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key

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
from semiseg_jax.methods.method import Batch, LabeledLoss, Outcome, State, mean
from semiseg_jax.methods.network import Network
from semiseg_jax.runtime import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvSemiSeg(AdversarialMethod):
    """L = L_x + a_x L_adv(x) + a_u L_adv(u) + weight * L_semi.

    L_adv is the cross-entropy of the discriminator's answer with "real", by pixel; L_semi is the
    cross-entropy of an unlabelled image with the network's own labels, where the discriminator's
    probability of "real" is at least the threshold, divided by the number of these pixels
    (its self-training loss). The discriminator's true maps are the labels of the step's own batch;
    the published code draws them anew. Labelled and unlabelled images have a pass each, and the
    weak norm: no view is a strong one.

    Attributes:
        weight: of L_semi.
        adversarial_labeled, adversarial_unlabeled: a_x and a_u.
    """

    weight: float
    adversarial_labeled: float
    adversarial_unlabeled: float
    views = Views(weak=1, strong=0)

    def init_params(self, key: Key[Array, ""], num_classes: int) -> Any:
        """See `AdversarialMethod.init_params`."""
        maps = jnp.zeros((1, 32, 32, num_classes), jnp.float32)
        return discriminator.PixelDiscriminator().init(key, maps)["params"]

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
        valid = batch.label != IGNORE, batch.valid
        fakes = (
            discriminator.predicted_map(logits_labeled, valid[0]),
            discriminator.predicted_map(logits_weak, valid[1]),
        )
        params = state.discriminator.params
        scores = [_scores(params, maps) for maps in fakes]

        labels = confidence.teacher_labels(logits_weak, batch.valid)
        passed = jax.nn.sigmoid(scores[1]) >= self.threshold
        begun = adversarial_method.has_begun(step, self.first_step)
        given = adversarial_method.passed_labels(labels, passed, begun)

        labeled = labeled_loss(logits_labeled, batch.label)
        adversarial = [
            mean(adversarial_losses.real_cross_entropy(*pair))
            for pair in zip(scores, valid, strict=True)
        ]
        semi = mean(consistency.hard_cross_entropy(logits_weak, given))
        loss = labeled + self.adversarial_labeled * adversarial[0]
        loss = loss + self.adversarial_unlabeled * adversarial[1] + self.weight * semi
        share = jnp.sum(passed & batch.valid) / jnp.maximum(jnp.sum(batch.valid), 1)
        return Outcome(
            loss,
            {
                "loss_labeled": labeled,
                "loss_adversarial_labeled": adversarial[0],
                "loss_adversarial_unlabeled": adversarial[1],
                "loss_self_training": semi,
                PASSED: share,
            },
            *adversarial_method.count_pixels(given, labels, logits_weak.shape[-1]),
            examples=Examples(
                discriminator.true_map(batch.label, fakes[0]), fakes, valid[0], valid
            ),
        )

    def discriminator_loss(
        self, params: Any, examples: Examples, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See `AdversarialMethod.discriminator_loss`."""
        del key
        return adversarial_losses.discriminator_loss(
            _scores(params, examples.real),
            tuple(_scores(params, maps) for maps in examples.fakes),
            examples.real_valid,
            examples.fake_valid,
        )


def _scores(params: Any, maps: Float[Array, "n h w classes"]) -> Float[Array, "n h w"]:
    return discriminator.PixelDiscriminator().apply({"params": params}, maps)


RULES: dict[str, rules.Rule] = adversarial_method.RULES | {
    "weight": rules.number(0, 1e6),
    "adversarial_labeled": rules.number(0, 1e6),
    "adversarial_unlabeled": rules.number(0, 1e6),
}

# Values of the keys in workdirs of older code, which lack them; those of configs/default.py.
DEFAULTS: dict[str, Any] = adversarial_method.DEFAULTS | {
    "threshold": 0.2,
    "start": 0.25,
    "weight": 0.1,
    "adversarial_labeled": 0.01,
    "adversarial_unlabeled": 0.001,
}
