"""CutMix-Seg: consistency with an EMA teacher under CutMix.

Source: French et al., "Semi-supervised semantic segmentation needs strong, varied perturbations",
BMVC 2020, section 3.2 and `train_seg_semisup_mask_mt.py` of its published code.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Integer, Key

from semiseg_jax.data.views import Views
from semiseg_jax.methods import averaged_teacher, confidence, consistency, mixing
from semiseg_jax.methods.averaged_teacher import AveragedTeacher
from semiseg_jax.methods.method import Batch, LabeledLoss, Outcome, State, mean
from semiseg_jax.methods.network import Network
from semiseg_jax.runtime import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutMix(AveragedTeacher):
    """L = L_x + weight * share * L_c.

    One box of half the area mixes the strong views of two neighbouring images and the teacher's
    predictions of their weak views: 2n unlabelled images make n mixed ones. L_c is the squared
    difference of the probabilities, summed over classes; share is that of the pixels whose teacher
    is confident, one number for the batch.

    Attributes:
        threshold: least confidence of a confident pixel.
        weight: of the consistency loss.
        divide_by: the pixels of the two means, see `confidence.PixelSet`; published: "all".
    """

    threshold: float
    weight: float
    divide_by: confidence.PixelSet
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
        teacher = network.predict(batch.weak, state.own["average"])
        first, second = mixing.split_pairs(
            {"image": batch.strong[:, 0], "logits": teacher, "valid": batch.valid}
        )
        pairs = len(first["valid"])
        boxes = mixing.cutmix_boxes(key, pairs, *batch.size, law="half_area")
        mixed = mixing.mix(boxes, second, first)

        logits_labeled = network(batch.image, "weak")
        logits_mixed = network(mixed["image"], "strong")
        labels = confidence.teacher_labels(mixed["logits"], mixed["valid"])
        share = confidence.confident_share(labels, self.threshold, self.divide_by)

        labeled = labeled_loss(logits_labeled, batch.label)
        consistent = mean(
            consistency.squared_difference(
                logits_mixed, mixed["logits"], mixed["valid"], self.divide_by
            )
        )
        return Outcome(
            labeled + self.weight * share * consistent,
            {"loss_labeled": labeled, "loss_consistency": consistent},
            *confidence.confident_pixels_by_class(labels, self.threshold, teacher.shape[-1]),
        )


RULES: dict[str, rules.Rule] = averaged_teacher.RULES | {
    "threshold": rules.number(0, 2),
    "weight": rules.number(0, 1e6),
    "divide_by": rules.one_of("valid", "all"),
}

# Values of the keys in workdirs of older code, which knew no method; those of configs/default.py.
DEFAULTS: dict[str, Any] = {
    "decay": 0.99,
    "warmup": False,
    "statistics": "average",
    "report": "average",
    "threshold": 0.97,
    "weight": 1.0,
    "divide_by": "valid",
}
