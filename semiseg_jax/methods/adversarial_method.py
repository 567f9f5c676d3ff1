"""Methods with a discriminator: a second network with a loss, an optimiser and a schedule.

A step computes one forward pass of the segmenter, and two losses. The segmenter's loss holds the
discriminator's parameters; the discriminator's loss holds the predictions. Both gradients are those
of the parameters from before the step, then both networks are updated, as in the published codes.
"""

import abc
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Integer, Key

from semiseg_jax import optim
from semiseg_jax.methods import confidence
from semiseg_jax.methods.confidence import TeacherLabels
from semiseg_jax.methods.method import DiscriminatorState, OnlineMethod
from semiseg_jax.runtime import rules

# Adam's, in PyTorch and so in the published codes.
_EPSILON = 1e-8

# Metric of a step: the share of pixels, or of images, that the discriminator takes for real.
PASSED = "passed"


@flax.struct.dataclass
class Examples:
    """What the discriminator learns from in a step, without gradient to the segmenter.

    Attributes:
        real: maps of true labels.
        fakes: maps of predictions, each from one pass of the segmenter.
        real_valid, fake_valid: false at padding and where the label is ignored.
    """

    real: Float[Array, "labeled h w channels"]
    fakes: tuple[Float[Array, "_n h w channels"], ...]
    real_valid: Bool[Array, "labeled h w"]
    fake_valid: tuple[Bool[Array, "_n h w"], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialMethod(OnlineMethod):
    """A method that trains a discriminator beside the segmenter.

    Its `loss` returns an outcome with `Examples`, and reads the parameters of
    `State.discriminator`, which it does not change.

    Attributes:
        threshold: least probability "real" of what has a self-training loss.
        start: share of the stage after which self-training begins; before it the discriminator has
            not learnt to tell labels from predictions, and may pass them all.
        num_steps: of the stage.
        discriminator_rate: learning rate of the discriminator at step 0. It does not depend on
            the batch (`optim.reference_batch`).
        discriminator_betas: see `optim.scale_by_adam`.
        discriminator_power: of its schedule, see `optim.poly`.
    """

    threshold: float
    start: float
    num_steps: int
    discriminator_rate: float
    discriminator_betas: tuple[float, float]
    discriminator_power: float

    @classmethod
    def from_config(cls, config: Any, name: str) -> "AdversarialMethod":
        """See `Method.from_config`."""
        section = config.method[name]
        fields = {field.name for field in dataclasses.fields(cls)} - {"num_steps"}
        # The config of a stored run has lists in the place of tuples.
        values = {field: rules.to_tuples(section[field]) for field in fields}
        return cls(**values, num_steps=config.train.steps)

    @property
    def filters_by_confidence(self) -> bool:
        """False: the discriminator chooses the pixels, see `discriminator_health`."""
        return False

    @property
    def first_step(self) -> int:
        """The number of updates before self-training begins."""
        return round(self.start * self.num_steps)

    @abc.abstractmethod
    def init_params(self, key: Key[Array, ""], num_classes: int) -> Any:
        """Returns the parameters of the discriminator at step 0.

        Args:
            key: of the initial values.
            num_classes: C.
        """

    @abc.abstractmethod
    def discriminator_loss(
        self, params: Any, examples: Examples, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Computes the discriminator's (loss, metrics).

        Args:
            params: of the discriminator; the loss is differentiated by them.
            examples: of the step.
            key: that `loss` had too; the two fold other numbers into it.
        """

    def init_discriminator(self, key: Key[Array, ""], num_classes: int) -> DiscriminatorState:
        """Returns the discriminator with its optimiser at step 0; arguments as `init_params`."""
        params = self.init_params(key, num_classes)
        return DiscriminatorState(params, self._optimizer().init(params))

    def update_discriminator(
        self, state: DiscriminatorState, examples: Examples, key: Key[Array, ""]
    ) -> tuple[DiscriminatorState, dict[str, Float[Array, ""]]]:
        """Returns the discriminator after a step, and metrics.

        Args:
            state: before the step.
            examples: from the outcome of `loss`.
            key: of the step, as for `loss`.
        """
        grads, metrics = jax.grad(self.discriminator_loss, has_aux=True)(
            state.params, jax.lax.stop_gradient(examples), key
        )
        updates, opt_state = self._optimizer().update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"gradient_norm_discriminator": optax.tree.norm(grads)}
        return DiscriminatorState(params, opt_state), metrics

    def _optimizer(self) -> optax.GradientTransformation:
        schedule = optim.poly(self.discriminator_rate, self.num_steps, self.discriminator_power)
        return optax.chain(
            optim.scale_by_adam(self.discriminator_betas, _EPSILON),
            optax.scale_by_learning_rate(schedule),
        )


def passed_labels(
    labels: TeacherLabels, passed: Bool[Array, "n #h #w"], begun: Bool[Array, ""]
) -> TeacherLabels:
    """The segmenter's own labels where they are trained on; others are IGNORE.

    Args:
        labels: of the segmenter.
        passed: what the discriminator takes for real, pixels or whole images.
        begun: whether self-training has.
    """
    kept = passed & begun & labels.valid
    return labels._replace(label=jnp.where(kept, labels.label, confidence.IGNORE))


def count_pixels(
    given: TeacherLabels, labels: TeacherLabels, num_classes: int
) -> tuple[Float[Array, " classes"], Float[Array, " classes"]]:
    """Counts (the pixels trained on, all valid pixels) by the class of their label.

    Args:
        given: from `passed_labels`.
        labels: of the segmenter.
        num_classes: C.
    """
    _, kept = confidence.confident_pixels_by_class(given, 0.0, num_classes)
    _, valid = confidence.confident_pixels_by_class(labels, 0.0, num_classes)
    return kept, valid


def has_begun(step: Integer[Array, ""], first_step: int) -> Bool[Array, ""]:
    """Whether self-training has begun at a step: after `first_step` updates."""
    return step >= first_step


# By key of the config of such a method.
RULES: dict[str, rules.Rule] = {
    "threshold": rules.number(0, 2),
    "start": rules.number(0, 1),
    "discriminator_rate": rules.number(0, 1000),
    "discriminator_betas": rules.pair(
        rules.below(0, 1), "two numbers, each at least 0 and below 1"
    ),
    "discriminator_power": rules.number(0, 1000),
}

# Values of the keys in workdirs of older code.
DEFAULTS: dict[str, Any] = {
    "discriminator_rate": 1e-4,
    "discriminator_betas": (0.9, 0.99),
    "discriminator_power": 0.9,
}
