"""ClassMix: classes of one image are pasted onto another, labelled by an EMA teacher.

Source: ClassMix (Olsson et al., WACV 2021), section 3 and `trainSSL.py` of its published code.
"""

import dataclasses
from typing import Any, Literal

from jaxtyping import Array, Integer, Key

from semiseg_jax.data.views import Views
from semiseg_jax.methods import averaged_teacher, confidence, consistency, mixing
from semiseg_jax.methods.averaged_teacher import AveragedTeacher
from semiseg_jax.methods.method import Batch, LabeledLoss, Outcome, State, mean
from semiseg_jax.methods.network import Network
from semiseg_jax.runtime import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassMix(AveragedTeacher):
    """L = L_x + weight * share * L_m.

    Half of the classes that the teacher sees in an image are cut out of it and pasted onto its
    partner; labels likewise. L_m is the cross-entropy with the mixed labels; share is that of the
    pixels whose teacher is confident, one number for the batch.

    Attributes:
        threshold: least confidence of a confident pixel.
        weight: of the loss of the mixed images.
        divide_by: the pixels of the two means, see `confidence.PixelSet`; published: "all".
        teacher_mode: "train" lets the teacher normalise by the moments of the batch, with dropout,
            as published; its labels then depend on the other images of the batch.
    """

    threshold: float
    weight: float
    divide_by: confidence.PixelSet
    teacher_mode: Literal["eval", "train"] = "eval"
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
        teacher = network.predict(batch.weak, state.own["average"], self.teacher_mode == "train")
        classes = teacher.shape[-1]
        own = confidence.teacher_labels(teacher, batch.valid)
        view = {"image": batch.strong[:, 0], "labels": own}
        masks = mixing.class_masks(key, own.label, classes)
        mixed = mixing.mix(masks, view, mixing.partners(view, order="next"))
        labels = mixed["labels"]

        logits_labeled = network(batch.image, "weak")
        logits_mixed = network(mixed["image"], "strong")
        share = confidence.confident_share(labels, self.threshold, self.divide_by)

        labeled = labeled_loss(logits_labeled, batch.label)
        unlabeled = mean(
            consistency.hard_cross_entropy(logits_mixed, labels, divide_by=self.divide_by)
        )
        return Outcome(
            labeled + self.weight * share * unlabeled,
            {"loss_labeled": labeled, "loss_mixed": unlabeled},
            *confidence.confident_pixels_by_class(labels, self.threshold, classes),
        )


RULES: dict[str, rules.Rule] = averaged_teacher.RULES | {
    "threshold": rules.number(0, 2),
    "weight": rules.number(0, 1e6),
    "divide_by": rules.one_of("valid", "all"),
    "teacher_mode": rules.one_of("eval", "train"),
}

# Values of the keys in workdirs of older code, which knew no method; those of configs/default.py.
DEFAULTS: dict[str, Any] = {
    "decay": 0.99,
    "warmup": True,
    "statistics": "average",
    "report": "average",
    "threshold": 0.968,
    "weight": 1.0,
    "divide_by": "valid",
    "teacher_mode": "eval",
}
