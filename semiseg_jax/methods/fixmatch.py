"""FixMatch for segmentation: one strong view, labelled by the network itself on the weak view.

Sources: FixMatch (Sohn et al., NeurIPS 2020), as the published code of UniMatch has it for
segmentation (`fixmatch.py`).
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Integer, Key

from semiseg_jax.data.views import Views
from semiseg_jax.methods import confidence, consistency, mixing
from semiseg_jax.methods.method import Batch, LabeledLoss, OnlineMethod, Outcome, State, mean
from semiseg_jax.methods.network import Network
from semiseg_jax.runtime import rules


@dataclasses.dataclass(frozen=True)
class FixMatch(OnlineMethod):
    """L = (L_x + L_s) / 2.

    An image's own labels come from the training-mode pass that it shares with the labelled images;
    those of its partner, inside the CutMix box, come from the network in evaluation mode, with the
    norm statistics from before the step.

    Attributes:
        threshold: least confidence of a pixel with a loss.
    """

    threshold: float
    views = Views(weak=1, strong=1)
    group_size = 2

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
        other = confidence.teacher_labels(network.predict(batch.weak), batch.valid)
        clean = network(network.join(batch.image, batch.weak), "weak")
        logits_labeled, logits_weak = network.split(clean, batch.image, batch.weak)
        own = confidence.teacher_labels(logits_weak, batch.valid)

        strong = batch.strong[:, 0]
        boxes = mixing.cutmix_boxes(key, len(strong), *batch.size)
        mixed = mixing.mix(boxes, mixing.partners(strong), strong)
        labels = mixing.mix(boxes, mixing.partners(other), own)

        labeled = labeled_loss(logits_labeled, batch.label)
        logits_strong = network(mixed, "strong")
        unlabeled = mean(consistency.hard_cross_entropy(logits_strong, labels, self.threshold))
        return Outcome(
            consistency.fixmatch_loss(labeled, unlabeled),
            {"loss_labeled": labeled, "loss_strong": unlabeled},
            *confidence.confident_pixels_by_class(labels, self.threshold, clean.shape[-1]),
        )


RULES: dict[str, rules.Rule] = {
    "threshold": rules.number(0, 2),
}

# Values of the keys in workdirs of older code, which knew no method; those of configs/default.py.
DEFAULTS: dict[str, Any] = {
    "threshold": 0.95,
}
