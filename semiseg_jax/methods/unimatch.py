"""UniMatch: two strong views and one of dropped features, labelled by the network itself.

Source: UniMatch (Yang et al., CVPR 2023), section 3 and `unimatch.py` of its published code.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Integer, Key

from semiseg_jax.data.views import Views
from semiseg_jax.methods import channel_dropout, confidence, consistency, mixing
from semiseg_jax.methods.image_keys import image_keys
from semiseg_jax.methods.method import Batch, LabeledLoss, OnlineMethod, Outcome, State, mean
from semiseg_jax.methods.network import Network
from semiseg_jax.runtime import rules


@dataclasses.dataclass(frozen=True)
class UniMatch(OnlineMethod):
    """L = (L_x + L_s1 / 4 + L_s2 / 4 + L_fp / 2) / 2.

    Labels as in `fixmatch.FixMatch`. L_fp is the loss of the weak view whose features, from the
    same encoding, have lost channels at random. The head's norms see clean and dropped features in
    one batch, as published; those of labelled images are not dropped here, since the published code
    does not use their logits.

    Attributes:
        threshold: least confidence of a pixel with a loss.
        dropout: share of the feature channels that are dropped.
    """

    threshold: float
    dropout: float
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
        drop_keys = image_keys(jax.random.fold_in(key, 0), images)

        other = confidence.teacher_labels(network.predict(batch.weak), batch.valid)
        features = network.encode(network.join(batch.image, batch.weak), "weak")
        of_labeled, of_weak = network.split(features, batch.image, batch.weak)
        dropped = channel_dropout.channel_dropout(drop_keys, of_weak, self.dropout)
        logits = network.decode(network.join(of_labeled, of_weak, dropped), "weak")
        logits_labeled, logits_weak, logits_dropped = network.split(
            logits, batch.image, batch.weak, batch.weak
        )
        own = confidence.teacher_labels(logits_weak, batch.valid)

        views = []
        for view in range(2):
            strong = batch.strong[:, view]
            box_key = jax.random.fold_in(key, 1 + view)
            boxes = mixing.cutmix_boxes(box_key, images, *batch.size)
            mixed = mixing.mix(boxes, mixing.partners(strong), strong)
            views.append((mixed, mixing.mix(boxes, mixing.partners(other), own)))
        logits_strong = network.split(
            network(network.join(*[mixed for mixed, _ in views]), "strong"), batch.weak, batch.weak
        )

        labeled = labeled_loss(logits_labeled, batch.label)
        losses = [
            mean(consistency.hard_cross_entropy(logits, labels, self.threshold))
            for logits, labels in (
                (logits_strong[0], views[0][1]),
                (logits_strong[1], views[1][1]),
                (logits_dropped, own),
            )
        ]
        return Outcome(
            consistency.unimatch_loss(labeled, *losses),
            {"loss_labeled": labeled}
            | dict(zip(("loss_strong_1", "loss_strong_2", "loss_dropped"), losses, strict=True)),
            *confidence.confident_pixels_by_class(own, self.threshold, logits.shape[-1]),
        )


RULES: dict[str, rules.Rule] = {
    "threshold": rules.number(0, 2),
    "dropout": rules.below(0, 1),
}

# Values of the keys in workdirs of older code, which knew no method; those of configs/default.py.
DEFAULTS: dict[str, Any] = {
    "threshold": 0.95,
    "dropout": 0.5,
}
