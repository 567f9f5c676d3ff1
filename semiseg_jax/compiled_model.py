"""A network and its jitted programs: training steps, evaluation, labelling."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from semiseg_jax import evaluate, optim, stages, train_state, train_step
from semiseg_jax.data.batch_layout import BatchSpec
from semiseg_jax.data.dataset import Dataset
from semiseg_jax.losses import supervised_loss
from semiseg_jax.methods import method as method_lib
from semiseg_jax.methods.adversarial_method import AdversarialMethod
from semiseg_jax.methods.method import OnlineMethod
from semiseg_jax.models import deeplab
from semiseg_jax.pseudo_labels import Labeler
from semiseg_jax.train_state import TrainState, Variables


@dataclasses.dataclass(frozen=True)
class StageProgram:
    """The compiled step of a kind of stage; students of all rounds share one.

    Attributes:
        step: from `train_step.make_train_step`.
        tx: the optimiser.
        schedule: the learning rate of the backbone by step.
        spec: the images of a batch.
        shapes: of the network's variables.
        model: the network.
        method: what labels images inside the step; None where none are.
        classes: names of the classes, for metrics by class.
    """

    step: Callable[..., tuple[TrainState, train_step.Metrics]]
    tx: Any
    schedule: Callable[[Any], jax.Array]
    spec: BatchSpec
    shapes: Variables
    model: Any = None
    method: OnlineMethod | None = None
    classes: tuple[str, ...] = ()

    def batch_shapes(self, crop: tuple[int, int]) -> dict[str, Any]:
        """Returns the shapes and dtypes of the arrays of a batch, as `TrainBatch.arrays` has them.

        Args:
            crop: (height, width) of the images, in pixels.
        """
        shapes: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(shape, dtype)
            for name, (shape, dtype) in self.spec.arrays(crop).items()
        }
        if self.spec.cache_features:
            images = jax.ShapeDtypeStruct((self.spec.size("weak"), *crop, 3), jnp.uint8)
            encode = functools.partial(self.model.apply, method="encode")
            shapes["features"] = jax.eval_shape(encode, self.shapes, images)
        return shapes

    def create_state(self, variables: Variables, mesh: Mesh, seed: int = 0) -> TrainState:
        """Returns the state of the stage at step 0, replicated over the mesh.

        Args:
            variables: of the network; they are copied.
            mesh: to put the state on.
            seed: of the initial values of the method's other networks.
        """
        if self.method is None:
            return train_state.create_train_state(variables, self.tx, mesh)
        init = functools.partial(self._init_method, jax.random.key(seed))
        return train_state.create_train_state(variables, self.tx, mesh, init)

    def _init_method(self, key: Array, variables: Variables) -> method_lib.State:
        assert self.method is not None
        images = jax.ShapeDtypeStruct((1, 65, 65, 3), jnp.uint8)
        encode = functools.partial(self.model.apply, method="encode")
        features = jax.eval_shape(encode, variables, images)
        auxiliary = self.method.init_auxiliary(key, features, self.model.num_classes)
        opt_state = self.tx.init(auxiliary["params"]) if auxiliary else {}
        discriminator: Any = {}
        if isinstance(self.method, AdversarialMethod):
            discriminator_key = jax.random.fold_in(key, 1)
            discriminator = self.method.init_discriminator(
                discriminator_key, self.model.num_classes
            )
        own = self.method.init_state(variables)
        return method_lib.State(own, auxiliary, opt_state, discriminator)

    def reported(self, state: TrainState) -> Variables:
        """Returns the weights of a state that are evaluated, label and are kept."""
        if self.method is None:
            return state.variables
        return self.method.reported(state.method.own, state.variables)

    def student(self, state: TrainState) -> Variables | None:
        """Returns the trained network's weights where others are reported; None otherwise."""
        if self.method is None:
            return None
        variables = state.variables
        is_reported = self.method.reported(state.method.own, variables) is variables
        return None if is_reported else variables


def make_program(
    config: Any,
    kind: str,
    num_steps: int,
    model: nn.Module,
    mesh: Mesh,
    classes: Sequence[str] = (),
) -> StageProgram:
    """Builds the step of a kind of stage; nothing is compiled before its first call.

    Runs of one process whose steps are the same, such as those of a sweep with other seeds, get the
    same object, which is traced and compiled once.

    Args:
        config: the whole config.
        kind: one of `stages.KINDS`.
        num_steps: steps of the stage.
        model: from `deeplab.build`.
        mesh: to run on.
        classes: names of the classes.
    """
    method = stages.online_method(config, kind)
    # A method of the user's own need not be hashable; its programs are not shared.
    build = _build_program if _is_hashable(method) else _build_program.__wrapped__
    return build(
        kind,
        num_steps,
        model,
        mesh,
        tuple(classes),
        _freeze(config.optim),
        optim.rate_factor(config),
        config.model.freeze_backbone,
        _freeze(config.loss),
        stages.batch_spec(config, kind),
        method,
    )


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _freeze(section: Any) -> ml_collections.FrozenConfigDict:
    """A section of the config that can be hashed."""
    return ml_collections.FrozenConfigDict(section.copy_and_resolve_references())


# It sees nothing of a run but its arguments. Not all are kept, which a long sweep over networks
# would not have the memory for.
@functools.lru_cache(maxsize=16)
def _build_program(
    kind: str,
    num_steps: int,
    model: nn.Module,
    mesh: Mesh,
    classes: tuple[str, ...],
    optim_config: Any,
    rate_factor: float,
    freeze_backbone: bool,
    loss_config: Any,
    spec: BatchSpec,
    method: OnlineMethod | None,
) -> StageProgram:
    tx, schedule = optim.make_optimizer(
        optim_config, kind, num_steps, rate_factor, freeze_backbone=freeze_backbone
    )
    if method is None:
        step = train_step.make_train_step(model, tx, loss_config, spec, mesh)
    else:
        step = train_step.make_method_step(method, model, tx, loss_config, mesh)
    shapes = train_state.variable_shapes(model)
    return StageProgram(step, tx, schedule, spec, shapes, model, method, classes)


class CompiledModel:
    """A network with its jitted programs, shared by every stage that uses the network.

    Attributes:
        model: the network.
        model_config: its section of the config, with every open key resolved.
        pretrained_mismatches: sentences on where the network differs from the one that its
            pretrained weights were trained in.
        shapes: of its variables.
        evaluate: evaluates on the reported set.
        select: evaluates on the set that the weights of a stage are selected on; `evaluate` itself
            where that is the reported set.
        label: labels the unlabelled images.

    Raises:
        UserError: as `supervised_loss.resolve`.
    """

    def __init__(self, config: Any, backbone: str, dataset: Dataset, mesh: Mesh):
        model_config = deeplab.config_for(config, backbone)
        # Resolved here, so that model/model.json does not need the file of the weights.
        self.pretrained_mismatches = deeplab.pretrained_mismatches(model_config)
        self.model_config = model_config = deeplab.resolve(model_config)
        self.model: nn.Module = deeplab.build(model_config, len(dataset.classes))
        self.pad_value = deeplab.input_mean(model_config)
        self.evaluate = evaluate.Evaluator(self.model, dataset, config.eval, mesh, self.pad_value)
        self.select = self.evaluate
        if config.eval.select == "holdout":
            held_out = dataclasses.replace(dataset, evaluation=dataset.selection)
            self.select = evaluate.Evaluator(
                self.model, held_out, config.eval, mesh, self.pad_value
            )
        self.label = Labeler(self.model, dataset, config, mesh, self.pad_value)
        self.shapes = train_state.variable_shapes(self.model)
        self._classes = dataset.classes
        pixels = np.array(dataset.labeled_pixels, np.int64)
        self._config = supervised_loss.resolve(config, pixels, dataset.classes)
        self._mesh = mesh
        # Students of all rounds have one, also where `make_program` does not share it.
        self._programs: dict[tuple[str, int], StageProgram] = {}

    def program(self, kind: str, num_steps: int) -> StageProgram:
        """The compiled step of a kind of stage; the same object at every call."""
        key = kind, num_steps
        if key not in self._programs:
            self._programs[key] = make_program(
                self._config, kind, num_steps, self.model, self._mesh, self._classes
            )
        return self._programs[key]
