"""A network and its jitted programs: training steps, evaluation, labelling."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from semiseg_jax import evaluate, optim, stages, train_state, train_step
from semiseg_jax.data.batch_layout import BatchSpec
from semiseg_jax.data.dataset import Dataset
from semiseg_jax.losses import supervised_loss
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
    """

    step: Callable[..., tuple[TrainState, train_step.Metrics]]
    tx: Any
    schedule: Callable[[Any], jax.Array]
    spec: BatchSpec
    shapes: Variables


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
        pixels = np.array(dataset.labeled_pixels, np.int64)
        self._config = supervised_loss.resolve(config, pixels, dataset.classes)
        self._mesh = mesh
        # Not functools.cache, which would keep every network of a sweep until its end.
        self._programs: dict[tuple[str, int], StageProgram] = {}

    def program(self, kind: str, num_steps: int) -> StageProgram:
        """The compiled step of a kind of stage; the same object at every call."""
        key = kind, num_steps
        if key not in self._programs:
            config = self._config
            tx, schedule = optim.make_optimizer(
                config.optim, kind, num_steps, optim.rate_factor(config)
            )
            spec = stages.batch_spec(config, kind)
            step = train_step.make_train_step(self.model, tx, config.loss, spec, self._mesh)
            self._programs[key] = StageProgram(step, tx, schedule, spec, self.shapes)
        return self._programs[key]
