"""Measures the programs of a run on this machine, in a few calls whose results are discarded."""

import contextlib
import dataclasses
import itertools
import time
from typing import Any

import jax
from jax.sharding import Mesh

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import stages, train_state
from semiseg_jax.compiled_model import CompiledModel
from semiseg_jax.data import input_pipeline, load
from semiseg_jax.data.dataset import Dataset
from semiseg_jax.planning import chips, run_time, work, workload
from semiseg_jax.planning.meter import Meter
from semiseg_jax.planning.run_time import Speed
from semiseg_jax.planning.work import ProgramId
from semiseg_jax.planning.workload import Workload
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.logger import capture_lines, logger
from semiseg_jax.shape_buckets import pad_size

# Steps that batches are made for; the measurement ends long before.
_STEPS = 10**6
# Evaluation is measured over one batch if that takes longer than LONG_SECONDS, else over so many.
LONG_SECONDS = 5.0
FEW_BATCHES = 5


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The workload of a config, and the speed of its programs on this machine."""

    load: Workload
    speed: Speed


def measure(config: Any) -> Measurement:
    """Measures each kind of training step, and a batch of evaluation; compiles these programs.

    Labelling follows from evaluation by its arithmetic. All processes must call the function; the
    times of process 0 count.

    Raises:
        UserError: the data or the config are refused as by a run.
    """
    mesh = mesh_lib.make_mesh()
    mesh_lib.check_batches(config, mesh.size)
    stages.check_norm_values(config)
    with capture_lines():  # The run prints these lines.
        dataset = load.load_dataset(config)
    counts = workload.from_dataset(config, dataset)
    parts = work.parts(config, counts, stages.schedule(config, ""))
    topology = chips.this_machine(mesh)
    logger.info("measuring the speed of this machine")
    costs = run_time.count_costs(config, counts, parts, topology)
    speed = Speed(costs, {})
    models: dict[str, CompiledModel] = {}
    for program in costs:
        if program.backbone not in models:
            models[program.backbone] = CompiledModel(config, program.backbone, dataset, mesh)
        model = models[program.backbone]
        if program.is_step:
            seconds, start = _measure_step(config, dataset, program, model, mesh)
            speed = speed.with_measured({program: seconds}, max(start, speed.start or 0.0))
        elif program.kind == "evaluation":
            seconds = _measure_evaluation(dataset, model, costs[program], mesh)
            speed = speed.with_measured({program: seconds})
    return Measurement(counts, speed)


def _measure_step(
    config: Any, dataset: Dataset, program_id: ProgramId, model: CompiledModel, mesh: Mesh
) -> tuple[float, float]:
    """Returns the seconds of a step with its input, and those until the first step has ended.

    Labelled images take the place of pseudo-labelled ones, which cost as much to read.
    """
    kind = program_id.kind.removesuffix(" step")
    meter = Meter(time.perf_counter)
    program = model.program(kind, stages.stage_steps(config.train, kind, 1))
    variables = train_state.init_variables(model.model, 0, mesh)
    state = train_state.create_train_state(variables, program.tx, mesh)
    batches = input_pipeline.train_batches(
        config,
        dataset,
        dataset.labeled,
        program.spec,
        stages.stage_seed(config.seed, 0, kind),
        range(_STEPS),
        pad_value=model.pad_value,
        groups=mesh.size,
        process_index=multihost.process_index(),
        process_count=multihost.process_count(),
    )
    key = jax.random.key(0)
    with contextlib.closing(batches):
        for step, batch in enumerate(batches, start=1):
            arrays = {"image": batch.image, "label": batch.label, "is_pseudo": batch.is_pseudo}
            state, metrics = program.step(state, mesh_lib.shard_batch(arrays, mesh), key)
            jax.block_until_ready(metrics)
            # All processes end at the same step.
            name = f"{kind} step {step} measured"
            seconds = multihost.broadcast_from_main(name, lambda step=step: meter.update(step))
            if seconds is not None:
                return seconds, max(meter.start_seconds - seconds, 0.0)
    raise AssertionError("the batches do not end")


def _measure_evaluation(
    dataset: Dataset,
    model: CompiledModel,
    cost: run_time.ProgramCost,
    mesh: Mesh,
) -> float:
    """Returns the seconds of a batch of evaluation, reading included.

    The batch has images of the largest padded size; the same ones again where there are few.
    """
    images = dataset.evaluation or dataset.selection
    pad_to = model.evaluate.pad_to
    sizes = input_pipeline.image_sizes(images)
    largest = [
        e for e, size in zip(images, sizes, strict=True) if pad_size(size, pad_to) == cost.size
    ]
    images = tuple(largest) or images
    variables = train_state.init_variables(model.model, 0, mesh)

    def evaluate_batches(count: int) -> float:
        """Returns the seconds of an evaluation of so many batches."""
        number = count * cost.images
        repeated = tuple(itertools.islice(itertools.cycle(images), number))
        began = time.perf_counter()
        model.evaluate(variables, examples=repeated)
        seconds = time.perf_counter() - began
        # All processes evaluate as many batches.
        return multihost.broadcast_from_main(f"{count} batches measured", lambda: seconds)

    evaluate_batches(1)
    one = evaluate_batches(1)
    if one > LONG_SECONDS:
        return one
    # The difference is without the start of the input pipeline.
    return max((evaluate_batches(FEW_BATCHES) - one) / (FEW_BATCHES - 1), 0.1 * one)
