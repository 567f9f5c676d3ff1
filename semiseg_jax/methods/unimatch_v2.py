"""UniMatch V2: two strong views with complementary feature dropout, labelled by an EMA teacher.

Source: UniMatch V2 (Yang et al., TPAMI 2025) and `unimatch_v2.py` of its published code.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Integer, Key

from semiseg_jax.data.views import Views
from semiseg_jax.methods import (
    averaged_teacher,
    channel_dropout,
    confidence,
    consistency,
    mixing,
)
from semiseg_jax.methods.averaged_teacher import AveragedTeacher
from semiseg_jax.methods.method import Batch, LabeledLoss, Outcome, State, mean
from semiseg_jax.methods.network import Network
from semiseg_jax.runtime import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniMatchV2(AveragedTeacher):
    """L = (L_x + (L_s1 + L_s2) / 2) / 2.

    The teacher labels the weak views in evaluation mode. Each strong view has a CutMix box of its
    own; of the features of the two views a channel mask keeps one half in the one and the other
    half in the other, except in half of the pairs.

    Attributes:
        threshold: least confidence of a pixel with a loss.
    """

    threshold: float
    views = Views(weak=1, strong=2)
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
        images = batch.weak.shape[0]
        teacher = network.predict(batch.weak, state.own["average"])
        own = confidence.teacher_labels(teacher, batch.valid)

        mixed, labels = [], []
        for view in range(2):
            strong = batch.strong[:, view]
            boxes = mixing.cutmix_boxes(jax.random.fold_in(key, view), images, *batch.size)
            mixed.append(mixing.mix(boxes, mixing.partners(strong), strong))
            labels.append(mixing.mix(boxes, mixing.partners(own), own))

        logits_labeled = network(batch.image, "weak")
        features = network.split(
            network.encode(network.join(*mixed), "strong"), batch.weak, batch.weak
        )
        dropped = channel_dropout.complementary_dropout(jax.random.fold_in(key, 2), *features)
        logits_strong = network.split(
            network.decode(network.join(*dropped), "strong"), batch.weak, batch.weak
        )

        labeled = labeled_loss(logits_labeled, batch.label)
        losses = [
            mean(consistency.hard_cross_entropy(logits, of_view, self.threshold))
            for logits, of_view in zip(logits_strong, labels, strict=True)
        ]
        return Outcome(
            consistency.unimatch_v2_loss(labeled, *losses),
            {"loss_labeled": labeled, "loss_strong_1": losses[0], "loss_strong_2": losses[1]},
            *confidence.confident_pixels_by_class(own, self.threshold, teacher.shape[-1]),
        )


RULES: dict[str, rules.Rule] = averaged_teacher.RULES | {
    "threshold": rules.number(0, 2),
}

# Values of the keys in workdirs of older code, which knew no method; those of configs/default.py.
DEFAULTS: dict[str, Any] = {
    "decay": 0.996,
    "warmup": True,
    "statistics": "average",
    "report": "average",
    "threshold": 0.95,
}
