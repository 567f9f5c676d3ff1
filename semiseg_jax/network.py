"""A network of a run, with all that is compiled for it."""

import dataclasses
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from semiseg_jax import evaluate, interruption, optim, steps
from semiseg_jax import state as state_lib
from semiseg_jax.data import sources, streams
from semiseg_jax.models import deeplab
from semiseg_jax.pseudo_labels import Labeler
from semiseg_jax.train import Program


class Network:
    """A network with what is compiled for it, shared by every stage that uses it.

    Attributes:
        model: the network itself.
        model_config: its section of the config, nothing of it open.
        departures: sentences on where it is not as the weights that it starts from were trained.
        shapes: of its variables.
        evaluate: on the reported set.
        select: on the set that a stage's weights are chosen on, where they are chosen; `evaluate`
            itself where that is the reported one.
        label: the unlabelled images.
    """

    def __init__(
        self,
        config: Any,
        backbone: str,
        dataset: sources.Dataset,
        mesh: Mesh,
        asked: interruption.Asked,
    ):
        model_config = deeplab.config_for(config, backbone)
        # Resolved here, so that model/model.json does not need the file of the weights.
        self.departures = deeplab.departures(model_config)
        self.model_config = model_config = deeplab.resolve(model_config)
        self.model: nn.Module = deeplab.build(model_config, len(dataset.classes))
        colour = deeplab.input_mean(model_config)
        self.evaluate = evaluate.Evaluator(self.model, dataset, config.eval, mesh, colour, asked)
        self.select = self.evaluate
        if config.eval.select == "holdout":
            held_out = dataclasses.replace(dataset, evaluation=dataset.selection)
            self.select = evaluate.Evaluator(self.model, held_out, config.eval, mesh, colour, asked)
        self.label = Labeler(self.model, dataset, config, mesh, colour, asked)
        self.shapes = state_lib.variable_shapes(self.model)
        self._config = config
        self._mesh = mesh
        # Not by functools.cache, which would hold every network of a study to its end.
        self._programs: dict[tuple[str, int], Program] = {}

    def program(self, kind: str, num_steps: int) -> Program:
        """The compiled step of a kind of stage; the same one whenever it is asked for."""
        key = kind, num_steps
        if key not in self._programs:
            self._programs[key] = self._make_program(kind, num_steps)
        return self._programs[key]

    def _make_program(self, kind: str, num_steps: int) -> Program:
        config = self._config
        factor = optim.rate_factor(config)
        tx, schedule = optim.make_optimizer(config.optim, kind, num_steps, factor)
        taken = streams.of_stage(config, kind)
        step = steps.make_train_step(self.model, tx, config.loss, taken, self._mesh)
        return Program(step, tx, schedule, taken, self.shapes)
