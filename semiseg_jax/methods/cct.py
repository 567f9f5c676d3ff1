"""Cross-consistency training (CCT): auxiliary decoders of perturbed features.

Source: Ouali et al., CVPR 2020, section 3 and the published code (yassouali/CCT).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key

from semiseg_jax.data.views import Views
from semiseg_jax.methods import (
    channel_dropout,
    confidence,
    consistency,
    guided_cutout,
    masks,
    perturbations,
    ramps,
    virtual_adversarial,
)
from semiseg_jax.methods.auxiliary_decoder import AuxiliaryDecoder
from semiseg_jax.methods.image_keys import image_keys
from semiseg_jax.methods.method import Batch, LabeledLoss, OnlineMethod, Outcome, State, mean
from semiseg_jax.methods.network import Network, Variables
from semiseg_jax.models import layers
from semiseg_jax.runtime import rules

# Of a perturbation, the number of auxiliary decoders that see it.
COUNTS = ("vat", "dropout", "cutout", "context_mask", "object_mask", "feature_drop", "noise")
MOST_FREQUENT = -1


@dataclasses.dataclass(frozen=True)
class CrossConsistency(OnlineMethod):
    """L = L_x + weight * ramp * the mean squared difference of the auxiliary predictions.

    Each auxiliary decoder predicts from the last features of the weak view, perturbed in one way,
    what the main decoder predicts from them as they are. The main decoder is that of the network.
    All images meet the weak norm: no view is a strong one.

    Attributes:
        weight: of the unlabelled loss.
        ramp: the share of the stage over which the weight grows from .0067 to its value.
        num_steps: of the stage.
        background: the class that is no object; MOST_FREQUENT for the class with the most labelled
            pixels of the batch.
        vat, dropout, cutout, context_mask, object_mask, feature_drop, noise: decoders of each kind.
    """

    weight: float
    ramp: float
    num_steps: int
    background: int
    vat: int
    dropout: int
    cutout: int
    context_mask: int
    object_mask: int
    feature_drop: int
    noise: int
    views = Views(weak=1, strong=0)

    @classmethod
    def from_config(cls, config: Any, name: str) -> "CrossConsistency":
        """See `Method.from_config`."""
        section = config.method[name]
        fields = {field.name for field in dataclasses.fields(cls)} - {"num_steps"}
        values = {field: section[field] for field in fields}
        return cls(**values, num_steps=config.train.steps)

    def init_auxiliary(self, key: Key[Array, ""], features: Any, num_classes: int) -> Variables:
        """Returns the parameters of all auxiliary decoders, stacked."""
        decoder = _decoder(features, num_classes)
        keys = jax.random.split(key, sum(getattr(self, name) for name in COUNTS))
        high = jnp.zeros(features.high.shape, jnp.float32)
        return {"params": jax.vmap(lambda k: decoder.init(k, high)["params"])(keys)}

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
        of_weak = network.encode(batch.weak, "weak")
        logits_weak = network.decode(of_weak, "weak")
        num_classes, size = logits_weak.shape[-1], logits_weak.shape[1:3]
        decoder = _decoder(of_weak, num_classes)
        background: Any = self.background
        if background == MOST_FREQUENT:
            background = masks.most_frequent_class(batch.label, num_classes)
        perturb = self._perturbations(jax.lax.stop_gradient(logits_weak), background, batch)
        predictions = []
        for i, perturbation in enumerate(perturb):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], state.auxiliary["params"])
            decode = lambda x, p=params: decoder.apply({"params": p}, x)  # noqa: E731
            keys = image_keys(jax.random.fold_in(key, i), batch.weak.shape[0])
            perturbed = perturbation(keys, decode, of_weak.high)
            predictions.append(layers.resize(decode(perturbed), size))

        labeled = labeled_loss(logits_labeled, batch.label)
        consistent = mean(consistency.auxiliary_consistency(predictions, logits_weak, batch.valid))
        ramp = ramps.ramp(step, self.ramp * self.num_steps)
        given = confidence.teacher_labels(logits_weak, batch.valid)
        return Outcome(
            labeled + self.weight * ramp * consistent,
            {"loss_labeled": labeled, "loss_consistency": consistent},
            *confidence.confident_pixels_by_class(given, 0.0, num_classes),
        )

    def _perturbations(
        self, logits: Float[Array, "n h w classes"], background: Any, batch: Batch
    ) -> list[Callable[..., Array]]:
        """The perturbation of each auxiliary decoder: (keys, decoder, features) -> features."""
        objects = masks.predicted_objects(logits, background, batch.valid)

        def cut(keys: Array, decode: Callable, features: Array) -> Array:
            assert boxes is not None
            keep = guided_cutout.keep_mask(keys, boxes, batch.size)
            return perturbations.keep_positions(features, keep)

        def vat(keys: Array, decode: Callable, features: Array) -> Array:
            predicted = jax.eval_shape(decode, features).shape[1:3]
            valid = masks.resize_nearest(batch.valid, predicted)
            return virtual_adversarial.perturb(keys, decode, features, valid=valid)

        def drop(keys: Array, decode: Callable, features: Array) -> Array:
            valid = masks.resize_nearest(batch.valid, features.shape[1:3])
            return perturbations.drop_attended(keys, features, valid=valid)

        boxes = guided_cutout.find_objects(objects) if self.cutout else None
        by_name: dict[str, Callable[..., Array]] = {
            "vat": vat,
            "dropout": lambda keys, decode, x: channel_dropout.channel_dropout(keys, x),
            "cutout": cut,
            "context_mask": lambda keys, decode, x: perturbations.keep_positions(x, objects),
            "object_mask": lambda keys, decode, x: perturbations.keep_positions(
                x, ~objects & batch.valid
            ),
            "feature_drop": drop,
            "noise": lambda keys, decode, x: perturbations.add_noise(keys, x),
        }
        return [by_name[name] for name in COUNTS for _ in range(getattr(self, name))]


def _decoder(features: Any, num_classes: int) -> AuxiliaryDecoder:
    """A decoder that enlarges by the stride of the features, to the next power of 2."""
    return AuxiliaryDecoder(num_classes, upscale=1 << (features.stride - 1).bit_length())


RULES: dict[str, rules.Rule] = {
    "weight": rules.number(0, 1e6),
    "ramp": rules.number(0, 1),
    "background": rules.integer(MOST_FREQUENT, 254),
    **dict.fromkeys(COUNTS, rules.integer(0, 64)),
}

# Values of the keys in workdirs of older code, which knew no method; those of configs/default.py.
DEFAULTS: dict[str, Any] = {
    "weight": 30.0,
    "ramp": 0.1,
    "background": 0,
    "vat": 2,
    "dropout": 6,
    "cutout": 6,
    "context_mask": 2,
    "object_mask": 2,
    "feature_drop": 6,
    "noise": 6,
}
