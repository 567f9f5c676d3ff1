"""PseudoSeg: soft labels fused from the decoder and from Grad-CAM refined by self-attention.

Source: Zou et al., ICLR 2021, section 3 and the published code (googleinterns/wss).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Key

from semiseg_jax.data.views import Views
from semiseg_jax.methods import (
    confidence,
    consistency,
    fusion,
    grad_cam,
    image_classifier,
    image_cutout,
    masks,
)
from semiseg_jax.methods.image_classifier import ImageClassifier
from semiseg_jax.methods.image_keys import image_keys
from semiseg_jax.methods.method import Batch, LabeledLoss, OnlineMethod, Outcome, State, mean
from semiseg_jax.methods.network import Network, Variables
from semiseg_jax.methods.self_attention import SelfAttention
from semiseg_jax.models import dsbn, layers
from semiseg_jax.runtime import rules


@dataclasses.dataclass(frozen=True)
class PseudoSeg(OnlineMethod):
    """L = L_x + L_attention + L_classes + weight * L_s.

    L_attention is the cross-entropy of the attention branch and L_classes the sigmoid
    cross-entropy of the image classifier, both on labelled images; L_s is the cross-entropy of the
    strong view with the fused soft labels of the weak view, without a threshold. The class maps of
    the weak view are those of the network as deployed, by its running moments.

    Attributes:
        weight: of the loss of strong views.
        temperature: that sharpens the fused labels.
        has_background: class 0 is a background class, which gets no class map.
        cutout: side in pixels of the square that is cut out of each strong view, even; 0 for none.
        classifier_dropout: rate of the dropout before the image classifier.
    """

    weight: float
    temperature: float
    has_background: bool
    cutout: int
    classifier_dropout: float
    views = Views(weak=1, strong=1)

    def _classifier(self, num_classes: int) -> ImageClassifier:
        outputs = num_classes - self.has_background
        return ImageClassifier(outputs, self.classifier_dropout)

    def init_auxiliary(self, key: Key[Array, ""], features: Any, num_classes: int) -> Variables:
        """Returns the variables of the image classifier and of the attention branch."""
        layout = dsbn.DomainLayout("weak", train=False)
        low, high = (jnp.zeros(x.shape, jnp.float32) for x in (features.low, features.high))
        keys = jax.random.split(key)
        classifier = self._classifier(num_classes).init(keys[0], high, layout)
        scores = jnp.zeros((*high.shape[:3], num_classes - self.has_background))
        attention = _attention(num_classes).init(keys[1], (low, high), scores, layout)
        return {
            "params": {"classifier": classifier["params"], "attention": attention["params"]},
            _STATISTICS: {"attention": attention[_STATISTICS]},
        }

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
        # First, for the running moments from before the step.
        features_weak = network.predict_features(batch.weak)
        features_labeled = network.encode(batch.image, "weak")
        logits_labeled = network.decode(features_labeled, "weak")
        logits_weak = network(batch.weak, "weak")
        num_classes, size = logits_weak.shape[-1], logits_weak.shape[1:3]

        classify = functools.partial(
            self._classifier(num_classes).apply, {"params": state.auxiliary["params"]["classifier"]}
        )
        dropout = {"dropout": jax.random.fold_in(key, 0)}
        logits_classes = classify(features_labeled.high, _LAYOUT, rngs=dropout)
        shown = masks.classes_in_labels(batch.label, num_classes)
        present = shown[:, int(self.has_background) :]
        predicted = image_classifier.predicted_classes(classify(features_weak.high, _INFERENCE))
        everywhere = jnp.ones(batch.label.shape, bool)
        attention_labeled, statistics = self._attend(
            state.auxiliary, features_labeled, present, everywhere
        )
        attention_weak, statistics = self._attend(
            state.auxiliary | statistics, features_weak, predicted, batch.valid
        )
        attention_labeled, attention_weak = (
            layers.resize(logits, size) for logits in (attention_labeled, attention_weak)
        )

        soft = fusion.calibrated_fusion(logits_weak, attention_weak, batch.valid, self.temperature)
        strong, seen = batch.strong[:, 0], batch.valid
        if self.cutout:
            keys = image_keys(jax.random.fold_in(key, 1), strong.shape[0])
            strong, seen = image_cutout.cut_square(
                keys, strong, seen, network.mean_color, self.cutout
            )
        logits_strong = network(strong, "strong")

        labeled = labeled_loss(logits_labeled, batch.label)
        of_attention = labeled_loss(attention_labeled, batch.label)
        of_classes = mean(
            image_classifier.sigmoid_cross_entropy(logits_classes, present, jnp.any(shown, axis=1))
        )
        of_strong = mean(consistency.soft_cross_entropy(logits_strong, soft, seen))
        given = confidence.teacher_labels(jnp.log(soft + 1e-30), batch.valid)
        return Outcome(
            labeled + of_attention + of_classes + self.weight * of_strong,
            {
                "loss_labeled": labeled,
                "loss_attention": of_attention,
                "loss_classes": of_classes,
                "loss_strong": of_strong,
            },
            *confidence.confident_pixels_by_class(given, 0.0, num_classes),
            statistics=statistics,
        )

    def _attend(
        self,
        auxiliary: Variables,
        features: Any,
        present: Bool[Array, "n outputs"],
        valid: Bool[Array, "n h w"],
    ) -> tuple[Float[Array, "n fh fw classes"], Variables]:
        """Logits of the attention branch at the size of the features, and its new statistics.

        Args:
            auxiliary: see `init_auxiliary`.
            features: from `Network.encode`.
            present: the classes of each image.
            valid: false at the padding of the images.
        """
        num_classes = present.shape[1] + self.has_background
        valid = masks.resize_nearest(valid, features.high.shape[1:3])
        classifier = functools.partial(
            self._classifier(num_classes).apply,
            {"params": auxiliary["params"]["classifier"]},
            layout=_INFERENCE,
        )
        scores = grad_cam.grad_cam(classifier, features.high, present, valid)
        logits, updated = _attention(num_classes).apply(
            {
                "params": auxiliary["params"]["attention"],
                _STATISTICS: auxiliary[_STATISTICS]["attention"],
            },
            (features.low, features.high),
            scores,
            _LAYOUT,
            valid,
            mutable=[_STATISTICS],
        )
        return logits, {_STATISTICS: {"attention": updated[_STATISTICS]}}


_LAYOUT = dsbn.DomainLayout("weak", train=True)
_INFERENCE = dsbn.DomainLayout("weak", train=False)
_STATISTICS = dsbn.stats_collection("weak")


def _attention(num_classes: int) -> SelfAttention:
    norm = functools.partial(dsbn.DomainNorm, kind="shared", momentum=0.999, epsilon=1e-3)
    return SelfAttention(num_classes, norm)


RULES: dict[str, rules.Rule] = {
    "weight": rules.number(0, 1e6),
    "temperature": rules.above(0, 1),
    "has_background": rules.BOOL,
    "cutout": (
        lambda v: type(v) is int and v % 2 == 0 and 0 <= v <= 2**14,
        "an even integer from 0",
    ),
    "classifier_dropout": rules.below(0, 1),
}

# Values of the keys in workdirs of older code, which knew no method; those of configs/default.py.
DEFAULTS: dict[str, Any] = {
    "weight": 1.0,
    "temperature": 0.5,
    "has_background": True,
    "cutout": 100,
    "classifier_dropout": 0.0,
}
