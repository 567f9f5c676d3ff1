"""One stage of a run: data, step, metrics, checkpoint, evaluation, until its last step."""

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from clu import periodic_actions
from etils import epath
from jax.sharding import Mesh

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import train_step
from semiseg_jax.checkpoints import Checkpoints
from semiseg_jax.compiled_model import StageProgram
from semiseg_jax.data import input_pipeline
from semiseg_jax.feature_cache import FeatureCache
from semiseg_jax.methods import label_health
from semiseg_jax.runtime import metric_writer, multihost, preemption
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.fileio import write_bytes
from semiseg_jax.runtime.logger import logger
from semiseg_jax.stages import Stage
from semiseg_jax.train_state import TrainState, Variables

PROFILED_STEPS = 5

Batches = Callable[[range], Generator[input_pipeline.TrainBatch]]


def run(
    stage: Stage,
    program: StageProgram,
    init_variables: Callable[[], Variables],
    batches: Batches,
    evaluate: Callable[[int, TrainState], None],
    train_config: Any,
    eval_every: int,
    mesh: Mesh,
    on_step: Callable[[int], None] = lambda step: None,
    feature_folder: epath.Path | None = None,
) -> TrainState:
    """Trains a stage, from its newest checkpoint if it has one.

    Do not change the order of operations in a step. (1) The batch is sent to the devices and the
    step is dispatched; only then are the metrics of the step before read, so that the devices work
    while the host reads, writes and makes the next batch. (2) Where due: metrics are written, then
    a checkpoint, then the evaluation is made. A checkpoint is written only after every step in it
    proved finite. A restart makes up for an evaluation that was cut off after its checkpoint.

    Args:
        stage: to train.
        program: its step.
        init_variables: makes the variables of step 0; not called if there is a checkpoint.
        batches: this process's batches for a range of steps.
        evaluate: evaluates the state at a step inside the stage and writes the row; does nothing if
            the row exists.
        train_config: `config.train`.
        eval_every: steps between evaluations inside the stage, 0 for none.
        mesh: to run on.
        on_step: called with the number of each step that was dispatched, once the step before it
            has ended.
        feature_folder: where features are kept; read where the batches of the program hold cached
            features.

    Returns:
        The state after the last step.

    Raises:
        UserError: the loss is not finite; the batch is written to a file to look at.
        Preempted: the run was asked to stop; the last step is in a checkpoint.
    """

    def evaluation_is_due(step: int) -> bool:
        return bool(eval_every) and 0 < step < stage.steps and step % eval_every == 0

    key = jax.random.key(int(stage.seed[0]) & 0xFFFFFFFF)
    with Checkpoints(stage.folder / "checkpoints", stage.seed) as checkpoints:
        newest = checkpoints.restore_newest(state_shapes(program, mesh))
        if newest:
            first, state = newest
            logger.info(f"going on at step {first}")
        else:
            first = 0
            seed = int(stage.seed[1]) & 0xFFFFFFFF
            state = program.create_state(init_variables(), mesh, seed)
        if evaluation_is_due(first):
            evaluate(first, state)
        writer = metric_writer.MetricWriter(stage.folder, resume_step=first)

        def save(step: int, state: TrainState) -> None:
            log.drain()
            # First, so that no checkpoint lacks it.
            metric_writer.write_window(stage.folder, step, log.window())
            checkpoints.save(step, state)

        log = _StepLogger(stage, program, writer, first, train_config)
        host_batches = batches(range(first, stage.steps))
        if program.spec.cache_features:
            assert feature_folder is not None
            cache = FeatureCache(feature_folder, program.model, state.variables)
            host_batches = cache.with_features(host_batches, program.spec, mesh)
        device_batches = _prefetch_to_device(host_batches, mesh, log)
        # Outside of the loop, so that leaving it by an exception closes the pipeline behind it.
        with contextlib.closing(device_batches):
            steps = range(first + 1, stage.steps + 1)
            for step, (arrays, batch) in zip(steps, device_batches, strict=True):
                state, metrics = program.step(state, arrays, key)
                log.on_step(step, metrics, batch)
                on_step(step)
                stopping = preemption.should_stop()
                if step == stage.steps or step % train_config.checkpoint_every == 0 or stopping:
                    save(step, state)
                if stopping:
                    raise preemption.Preempted
                if evaluation_is_due(step):
                    log.drain()
                    try:
                        evaluate(step, state)
                    except preemption.Preempted:
                        # A restart evaluates the step that is saved here.
                        if checkpoints.latest() != step:
                            save(step, state)
                        raise
        log.drain()
        writer.close()
    return state


def restore(stage: Stage, program: StageProgram, mesh: Mesh) -> TrainState | None:
    """The state of a finished stage; None if its last checkpoint is missing or damaged.

    Args:
        stage: with its folder.
        program: for the shapes of its state.
        mesh: to put the state on.
    """
    with Checkpoints(stage.folder / "checkpoints", stage.seed) as checkpoints:
        newest = checkpoints.restore_newest(state_shapes(program, mesh))
    return newest[1] if newest and newest[0] == stage.steps else None


def state_shapes(program: StageProgram, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state of a stage."""
    sharding = mesh_lib.replicated(mesh)
    create = functools.partial(program.create_state, mesh=mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(create, program.shapes),
    )


def trace_step(program: StageProgram, crop: tuple[int, int], mesh: Mesh) -> jax.stages.Traced:
    """Traces the step of a stage from shapes; nothing is computed.

    Args:
        program: of the stage.
        crop: (height, width) of its images, in pixels.
        mesh: to compile for.
    """
    sharding = mesh_lib.batch_sharding(mesh)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.batch_shapes(crop),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    step: Any = program.step
    return step.trace(state_shapes(program, mesh), batch, key)


def check_fits_memory(kind: str, step: jax.stages.Traced) -> None:
    """Compiles a step before anything runs, so that a lack of device memory is found then.

    The compiled step is cached on disk (`xla.enable_compilation_cache`), and not compiled again.

    Args:
        kind: of the stage.
        step: from `trace_step`.

    Raises:
        UserError: the step needs more memory than a device has.
    """
    compiled = mesh_lib.try_compile(step)
    if isinstance(compiled, str):
        raise UserError(
            f"The {kind}'s step does not fit into the memory of a device "
            f"({compiled.splitlines()[0].rstrip('.')}): python -m semiseg_jax.plan with this "
            "config tells the smallest change that makes it fit a TPU; docs/own_data.md has what "
            "to lower elsewhere.",
            code="step-exceeds-memory",
        )


def _prefetch_to_device(
    batches: Iterator[input_pipeline.TrainBatch], mesh: Mesh, log: "_StepLogger"
) -> Generator[tuple[dict[str, jax.Array], input_pipeline.TrainBatch], None, None]:
    """Yields (device arrays, batch) with the transfer under way; counts the time spent waiting."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        log.add_input_wait(time.perf_counter() - began)
        if batch is None:
            return
        yield mesh_lib.shard_batch(batch.arrays(), mesh), batch


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a step by name, those of classes as NAME/0, NAME/1, …"""
    scalars: dict[str, float] = {}
    for name, value in metrics.items():
        if np.ndim(value):
            scalars |= {f"{name}/{i}": float(v) for i, v in enumerate(value)}
        else:
            scalars[name] = float(value)
    return scalars


class _StepLogger:
    """Reads metrics one step late, checks them, and writes their means every `log_every` steps."""

    def __init__(
        self,
        stage: Stage,
        program: StageProgram,
        writer: metric_writer.MetricWriter,
        first: int,
        train_config: Any,
    ):
        self._stage = stage
        self._program = program
        self._writer = writer
        self._config = train_config
        # (step, metrics on the devices, batch) of the steps whose metrics are not read yet.
        self._pending: collections.deque = collections.deque()
        # Of the steps since the last line, also of those before a restart.
        window = metric_writer.read_window(stage.folder, first)
        self._window, self._input_wait = window.values, window.input_wait
        now = time.perf_counter()
        self._window_start = now - window.seconds
        self._run_start = (first, now)
        self._images_per_step = program.spec.num_images
        self._progress = periodic_actions.ReportProgress(
            num_train_steps=stage.steps, writer=writer.tensorboard, every_secs=60.0
        )
        # Lines of metrics so far, and the warnings of labels that they led to.
        self._lines: list[dict[str, Any]] = []
        self._warnings: set[str] = set()
        if program.method:
            before = metric_writer.read_metrics(stage.folder)
            self._lines = [line for line in before if line["step"] <= first]
        self._profile = None
        # Only if the stage lasts long enough for the profile to end in it.
        fits = 0 < train_config.profile_at <= stage.steps - PROFILED_STEPS
        if fits and multihost.is_main():
            self._profile = periodic_actions.Profile(
                logdir=str(stage.folder),
                num_profile_steps=PROFILED_STEPS,
                first_profile=train_config.profile_at,
                every_secs=None,
                profile_duration_ms=None,
            )

    def add_input_wait(self, seconds: float) -> None:
        """Adds time that the step waited for the input pipeline."""
        self._input_wait += seconds

    def on_step(
        self, step: int, metrics: train_step.Metrics, batch: input_pipeline.TrainBatch
    ) -> None:
        """Takes the metrics of a step that was dispatched; reads those of the step before."""
        self._pending.append((step, metrics, batch))
        while len(self._pending) > 1:
            self._read()
        self._progress(step)
        if self._profile:
            with metric_writer.raise_write_errors(self._stage.folder):
                self._profile(step)

    def window(self) -> metric_writer.MetricWindow:
        """Returns what was measured since the last line."""
        seconds = time.perf_counter() - self._window_start
        return metric_writer.MetricWindow(self._window, seconds, self._input_wait)

    def drain(self) -> None:
        """Reads the metrics of all dispatched steps."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, metrics, batch = self._pending.popleft()
        values = _scalars(jax.device_get(metrics))
        # The gradient of a discriminator, too: its checkpoint would be the end of the next step.
        names = ("loss", "gradient_norm", "gradient_norm_discriminator")
        if not all(np.isfinite(values[name]) for name in names if name in values):
            rates = "teacher" if self._stage.kind == "teacher" else "student"
            own_ids = (*batch.ids, *batch.unlabeled_ids)
            ids = itertools.chain(*multihost.all_gather("images of the batch", own_ids))
            raise UserError(
                f"The loss of {self._stage.name} is not finite at step {step} (images "
                f"{', '.join(ids)}): look at this batch in {self._dump_batch(step, batch)}, or "
                f"lower optim.{rates}.learning_rate with another --workdir; the checkpoints before "
                "it are kept.",
                code="loss-not-finite",
                in_every_process=True,
            )
        self._window.append(values)
        if step % self._config.log_every == 0 or step == self._stage.steps:
            self._write(step)

    def _dump_batch(self, step: int, batch: input_pipeline.TrainBatch) -> epath.Path:
        """Writes a batch to a file (image, label, is_pseudo, ids) and returns its path.

        Each process writes its shard.
        """
        several = multihost.process_count() > 1
        shard = f"_part_{multihost.process_index()}" if several else ""
        path = self._stage.folder / f"not_finite_step_{step}{shard}.npz"
        content = io.BytesIO()
        # Without features, which follow from the images.
        without = dataclasses.replace(batch, features=None)
        arrays = {k: v for k, v in dataclasses.asdict(without).items() if v is not None}
        np.savez_compressed(content, **arrays)
        write_bytes(path, content.getvalue())
        return path

    def _write(self, step: int) -> None:
        now = time.perf_counter()
        seconds = max(now - self._window_start, 1e-9)
        means = {k: float(np.mean([w[k] for w in self._window])) for k in self._window[0]}
        if self._program.method:
            means = label_health.by_class(means, self._program.classes)
        steps_per_second = len(self._window) / seconds
        scalars = means | {
            "learning_rate": float(self._program.schedule(step - 1)),
            "images_per_second": steps_per_second * self._images_per_step,
            "input_wait": self._input_wait / seconds,
        }
        self._writer.write_scalars(step, scalars | {"seconds": seconds})
        self._writer.flush()
        self._warn_of_labels({"step": step, **means})
        first, began = self._run_start
        seconds_left = (now - began) / (step - first) * (self._stage.steps - step)
        logger.info(
            f"step {step}/{self._stage.steps}  loss {means['loss']:.3f}  "
            f"{scalars['images_per_second']:.1f} images/s  input wait "
            f"{100 * scalars['input_wait']:.0f}%  {seconds_left / 60:.1f} min left"
        )
        self._window, self._input_wait, self._window_start = [], 0.0, now

    def _warn_of_labels(self, line: dict[str, Any]) -> None:
        """Logs, once each, in what way the labels of the method have trained nothing so far."""
        if self._program.method is None:
            return
        self._lines.append(line)
        health = label_health.summarize(
            self._lines, self._stage.steps, self._program.classes, self._program.method
        )
        for warning in health.warnings if health else ():
            if warning not in self._warnings:
                logger.info(f"Warning: {warning}")
                self._warnings.add(warning)
