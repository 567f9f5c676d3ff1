"""The interface of a semi-supervised method.

An online method says which views of an unlabelled image it needs, which state it has beside the
network's, what its loss is, and which weights are reported. The rest of the package does not know
which method runs.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, Key

from semiseg_jax.data.views import Views
from semiseg_jax.methods.network import Network, Variables

# (logits, labels) -> mean loss over the valid labelled pixels, by `config.loss`
LabeledLoss = Callable[[Float[Array, "n h w classes"], Integer[Array, "n h w"]], Float[Array, ""]]

# Metrics of a step that have a number for each class.
KEPT_PIXELS, LABELED_PIXELS = "kept_pixels", "labeled_pixels"


@flax.struct.dataclass
class Batch:
    """The images of a step.

    Attributes:
        image: labelled images, weakly augmented, uint8.
        label: class ids and IGNORE, uint8.
        weak: the weak view of each unlabelled image, uint8.
        strong: its strong views, with the geometry of the weak one, uint8.
        valid: false at the padding of its views.
    """

    image: Integer[Array, "labeled h w 3"]
    label: Integer[Array, "labeled h w"]
    weak: Integer[Array, "n h w 3"]
    strong: Integer[Array, "n views h w 3"]
    valid: Bool[Array, "n h w"]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of all images, in pixels."""
        return self.valid.shape[1], self.valid.shape[2]


@flax.struct.dataclass
class DiscriminatorState:
    """A discriminator in the train state; trees of arrays.

    Attributes:
        params: of the discriminator.
        opt_state: state of its own optimiser.
    """

    params: Any
    opt_state: Any


@flax.struct.dataclass
class State:
    """What a method has beside the network, in the train state; trees of arrays.

    Attributes:
        own: from `OnlineMethod.init_state` and `update_state`, such as an averaged teacher.
        auxiliary: variables of the auxiliary networks, from `OnlineMethod.init_auxiliary`.
        opt_state: state of their optimiser; {} without such networks.
        discriminator: a `DiscriminatorState`, of an `AdversarialMethod`; {} for other methods, so
            that their checkpoints have no names of it.
    """

    own: Any
    auxiliary: Variables
    opt_state: Any
    discriminator: Any = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Outcome:
    """What the loss of a step came to.

    Attributes:
        loss: a mean over the global batch; parameters are updated by its gradient.
        terms: its terms by name, before their weights.
        kept: unlabelled pixels that had a loss, by the class of their label.
        labeled: all valid unlabelled pixels by the class of their label.
        statistics: new statistics of the auxiliary networks, by collection.
        examples: what a discriminator learns from, see `adversarial_method.Examples`; {} without.
    """

    loss: Float[Array, ""]
    terms: dict[str, Float[Array, ""]]
    kept: Float[Array, " classes"]
    labeled: Float[Array, " classes"]
    statistics: Variables = flax.struct.field(default_factory=dict)
    examples: Any = flax.struct.field(default_factory=dict)

    def metrics(self) -> dict[str, Array]:
        """The metrics of a step: scalars, and the two counts by class, [classes] each."""
        share = jnp.sum(self.kept) / jnp.maximum(jnp.sum(self.labeled), 1)
        counts = {KEPT_PIXELS: self.kept, LABELED_PIXELS: self.labeled}
        return {"loss": self.loss, **self.terms, "kept": share, **counts}


class Method:
    """How unlabelled images train a student: self-training, or an `OnlineMethod`.

    Subclasses are frozen data classes, whose fields are the keys of `config.method.NAME`.

    Attributes:
        views: of each unlabelled image, which the input pipeline delivers for labels that are made
            inside the step; None where labels are made before the stage.
    """

    views: Views | None = None

    @classmethod
    def from_config(cls, config: Any, name: str) -> "Method":
        """Returns the method of a config.

        Args:
            config: the whole config.
            name: of the section of `config.method` with the method's keys.
        """
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return cls(**{field.name: config.method[name][field.name] for field in fields})


class OnlineMethod(Method, abc.ABC):
    """A method that labels the unlabelled images of a batch inside the training step.

    Attributes:
        views: of each unlabelled image.
        group_size: how many images of a device are mixed with each other; 1 if none are. The
            unlabelled images of each device are a multiple of it.
    """

    views: Views
    group_size: int = 1

    @property
    def filters_by_confidence(self) -> bool:
        """Whether uncertain pixels have no loss, or lower it: by a threshold above 0."""
        return getattr(self, "threshold", 0.0) > 0

    def init_state(self, variables: Variables) -> Any:
        """Returns the method's own state at step 0, a tree of arrays.

        Args:
            variables: of the network at step 0.
        """
        del variables
        return {}

    def init_auxiliary(self, key: Key[Array, ""], features: Any, num_classes: int) -> Variables:
        """Returns the variables of networks that the method trains beside the segmenter.

        Their parameters get the gradient of the same loss, and have the learning rate of the head.

        Args:
            key: of the initial values.
            features: what `Network.encode` returns, arrays or shapes.
            num_classes: C.

        Returns:
            {"params": …}, with statistics collections where the networks have any; {} without
            such networks.
        """
        del key, features, num_classes
        return {}

    @abc.abstractmethod
    def loss(
        self,
        network: Network,
        labeled_loss: LabeledLoss,
        state: State,
        batch: Batch,
        step: Integer[Array, ""],
        key: Key[Array, ""],
    ) -> Outcome:
        """Computes the loss of a step.

        Args:
            network: its parameters, and those of `state.auxiliary`, are what the loss is
                differentiated by.
            labeled_loss: of labelled pixels.
            state: of the method before the step.
            batch: the global batch.
            step: number of updates before this one.
            key: of this step, for what the method draws.
        """

    def update_state(self, own: Any, variables: Variables, step: Integer[ArrayLike, ""]) -> Any:
        """Returns the method's own state after a step.

        Args:
            own: before the step.
            variables: of the network after its update.
            step: number of updates before this one.
        """
        del variables, step
        return own

    def reported(self, own: Any, variables: Variables) -> Variables:
        """Returns the weights that are evaluated and kept: the network's, or their average.

        Args:
            own: the method's own state.
            variables: of the network.
        """
        del own
        return variables


def mean(sum_and_count: tuple[Float[Array, ""], Float[Array, ""]]) -> Float[Array, ""]:
    """Divides the sum of a loss by its count of pixels; 0 where there are none."""
    total, count = sum_and_count
    return total / jnp.maximum(count, 1)
