"""Measures the programs of a run on this machine, in a few calls whose results are discarded."""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
import time
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import self_training, stages, train, train_state
from semiseg_jax.compiled_model import CompiledModel
from semiseg_jax.data import input_pipeline, load
from semiseg_jax.data.batch_layout import BatchSpec
from semiseg_jax.data.dataset import Dataset
from semiseg_jax.feature_cache import FeatureCache
from semiseg_jax.inference import Predictor
from semiseg_jax.planning import chips, run_time, work, workload
from semiseg_jax.planning.meter import Meter
from semiseg_jax.planning.run_time import Speed
from semiseg_jax.planning.work import ProgramId
from semiseg_jax.planning.workload import Workload
from semiseg_jax.runtime import multihost, preemption
from semiseg_jax.runtime.logger import capture_lines, logger
from semiseg_jax.shape_buckets import pad_size
from semiseg_jax.train_state import Variables

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

    Labelling follows from the network's share of evaluation by its arithmetic. All processes must
    call the function; the times of process 0 count.

    Raises:
        UserError: the data or the config are refused as by a run.
        Preempted: the command was asked to stop.
    """
    mesh = mesh_lib.make_mesh()
    mesh_lib.check_batches(config, mesh.size)
    stages.check_norm_values(config)
    stages.check_method(config, mesh.size)
    self_training.find_initial_weights(config)
    with capture_lines():  # The run prints these lines.
        dataset = load.load_dataset(config)
    self_training.check_unlabeled(config, dataset)
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
            seconds, network = _measure_evaluation(config, dataset, model, costs[program], mesh)
            speed = speed.with_measured({program: seconds})
            labelling = ProgramId("labelling", program.backbone)
            if labelling in costs:
                # Reading and counting take as long for one scale as for all.
                of_network = network * costs[labelling].flops / costs[program].flops
                speed = speed.with_measured({labelling: of_network + max(seconds - network, 0.0)})
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
    if mesh_lib.platform(mesh) != "cpu":
        train.check_fits_memory(kind, train.trace_step(program, tuple(config.data.crop), mesh))
    variables = train_state.init_variables(model.model, 0, mesh)
    state = program.create_state(variables, mesh)
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
    with contextlib.ExitStack() as stack:
        if program.spec.cache_features:
            # Not the folder of the runs: these weights are no run's.
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            cache = FeatureCache(epath.Path(folder), program.model, state.variables)
            batches = _with_features_of_first(batches, cache, program.spec, mesh)
        stack.enter_context(contextlib.closing(batches))
        for step, batch in enumerate(batches, start=1):
            arrays = mesh_lib.shard_batch(batch.arrays(), mesh)
            state, metrics = program.step(state, arrays, key)
            jax.block_until_ready(metrics)
            preemption.raise_if_stopping()
            # All processes end at the same step.
            name = f"{kind} step {step} measured"
            seconds = multihost.broadcast_from_main(name, functools.partial(meter.update, step))
            if seconds is not None:
                return seconds, max(meter.start_seconds - seconds, 0.0)
    raise AssertionError("the batches do not end")


def _with_features_of_first(
    batches: Generator[input_pipeline.TrainBatch], cache: FeatureCache, spec: BatchSpec, mesh: Mesh
) -> Generator[input_pipeline.TrainBatch]:
    """Yields batches with the features of the first one, as nearly all steps of a run find them."""
    with contextlib.closing(cache.with_features(batches, spec, mesh)) as computed:
        first = next(computed)
        yield first
        for batch in batches:
            yield dataclasses.replace(batch, features=first.features)


def _measure_evaluation(
    config: Any,
    dataset: Dataset,
    model: CompiledModel,
    cost: run_time.ProgramCost,
    mesh: Mesh,
) -> tuple[float, float]:
    """Returns the seconds of a batch of evaluation, reading included, and those of its network.

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
    seconds = evaluate_batches(1)
    if seconds < LONG_SECONDS:
        # The difference is without the start of the input pipeline.
        more = (evaluate_batches(FEW_BATCHES) - seconds) / (FEW_BATCHES - 1)
        seconds = max(more, 0.1 * seconds)
    return seconds, _measure_network(config, model, variables, cost, mesh)


def _measure_network(
    config: Any, model: CompiledModel, variables: Variables, cost: run_time.ProgramCost, mesh: Mesh
) -> float:
    """Returns the seconds that the network takes for a batch of evaluation."""
    settings = config.eval
    predictor = Predictor(
        model.model,
        mesh,
        settings.scales,
        settings.flip,
        window=settings.window,
        window_stride=settings.window_stride,
    )
    variables = train_state.inference_variables(variables)
    local = cost.images // multihost.process_count()
    image = np.zeros((local, *cost.size, 3), np.uint8)
    seconds = []
    for _ in range(FEW_BATCHES):
        began = time.perf_counter()
        arrays = mesh_lib.shard_batch({"image": image}, mesh)
        jax.block_until_ready(predictor(variables, arrays["image"]))
        seconds.append(time.perf_counter() - began)
        # The first one is compiled in; one more is enough where it is long.
        long = multihost.broadcast_from_main("network", lambda: seconds[-1] > LONG_SECONDS)
        if long and len(seconds) > 1:
            break
    return min(seconds[1:])
