"""One stage of a run: data, step, metrics, checkpoint, evaluation, until its last step."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from clu import metric_writers, periodic_actions
from etils import epath
from jax.sharding import Mesh

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import state as state_lib
from semiseg_jax import steps
from semiseg_jax.checkpoints import Checkpoints
from semiseg_jax.data import pipeline
from semiseg_jax.data.streams import Streams
from semiseg_jax.errors import UserError
from semiseg_jax.evaluate import Score
from semiseg_jax.state import TrainState, Variables

PROFILED_STEPS = 5

Batches = Callable[[range], Iterator[pipeline.TrainBatch]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage trains.

    Attributes:
        kind: "teacher", "student" or "control".
        round: 0 for teacher and control, then that of the student.
        steps: optimiser steps.
        seed: of order and augmentation, from `streams.stage_seed`.
        folder: for checkpoints and metrics.
    """

    kind: str
    round: int
    steps: int
    seed: np.ndarray
    folder: epath.Path

    @property
    def name(self) -> str:
        """For people: "student 2", "teacher"."""
        return f"student {self.round}" if self.kind == "student" else self.kind


@dataclasses.dataclass(frozen=True)
class Program:
    """A stage's compiled step and what goes with it; students of all rounds share one."""

    step: Callable[..., tuple[TrainState, steps.Metrics]]
    tx: Any
    schedule: Callable[[Any], jax.Array]
    streams: Streams
    shapes: Variables  # of the network's variables


def run(
    stage: Stage,
    program: Program,
    start: Callable[[], Variables],
    batches: Batches,
    evaluate: Callable[[Variables], Score],
    report: Callable[[int, Score], None],
    say: Callable[[str], None],
    train_config: Any,
    eval_every: int,
    mesh: Mesh,
) -> Variables:
    """Trains a stage, from its newest checkpoint where it has one.

    The order of things, step by step: the batch is put on its way to the devices and the step
    dispatched; only then the metrics of the step before are read, so that the devices have work
    while the host reads, writes and makes the next batch; where due, metrics are written, then an
    evaluation is made, then a checkpoint: a restart from it has lost none of them. A checkpoint is
    written only after every step in it proved finite.

    Args:
        stage: what to train.
        program: its step.
        start: makes the variables of step 0; not called when a checkpoint is there.
        batches: this process's batches for a range of steps.
        evaluate: scores variables.
        report: takes (step, score) of each evaluation inside the stage.
        say: prints a line of progress.
        train_config: `config.train`.
        eval_every: steps between evaluations inside the stage, 0 for none.
        mesh: to run on.

    Returns:
        The variables after the last step.

    Raises:
        UserError: the loss is not finite.
    """
    key = jax.random.key(int(stage.seed[0]) & 0xFFFFFFFF)
    with Checkpoints(stage.folder / "checkpoints") as checkpoints:
        first = checkpoints.latest() or 0
        if first:
            state = _restored(program, checkpoints, first, mesh)
            say(f"going on at step {first}")
        else:
            state = state_lib.create(start(), program.tx, mesh)
        writer = metric_writers.create_default_writer(stage.folder, asynchronous=False)
        log = _Log(stage, program, writer, say, first, train_config)
        ahead = _ahead(batches(range(first, stage.steps)), mesh, log)
        for step, (arrays, ids) in zip(range(first, stage.steps), ahead, strict=True):
            state, metrics = program.step(state, arrays, key)
            log.dispatched(step + 1, metrics, ids)
            last = step + 1 == stage.steps
            if eval_every and not last and (step + 1) % eval_every == 0:
                log.settle()
                score = evaluate(state.variables)
                report(step + 1, score)
                say(f"step {step + 1}: mIoU {100 * score.miou:.2f}")
            if last or (step + 1) % train_config.checkpoint_every == 0:
                log.settle()
                checkpoints.save(step + 1, state)
        log.settle()
        writer.close()
    return state.variables


def restore(stage: Stage, program: Program, mesh: Mesh) -> Variables:
    """The variables of a finished stage, from its last checkpoint.

    Raises:
        UserError: it has none of its last step.
    """
    with Checkpoints(stage.folder / "checkpoints") as checkpoints:
        if checkpoints.latest() != stage.steps:
            raise UserError(
                f"{stage.folder} is marked as done, but has no checkpoint of step {stage.steps}: "
                "remove that folder to train it again."
            )
        return _restored(program, checkpoints, stage.steps, mesh).variables


def _restored(program: Program, checkpoints: Checkpoints, step: int, mesh: Mesh) -> TrainState:
    whole = mesh_lib.replicated(mesh)
    create = functools.partial(state_lib.create, tx=program.tx, mesh=mesh)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(create, program.shapes),
    )
    return checkpoints.restore(step, like)


def _ahead(
    batches: Iterator[pipeline.TrainBatch], mesh: Mesh, log: "_Log"
) -> Iterator[tuple[dict[str, jax.Array], tuple[str, ...]]]:
    """(arrays, ids) of each batch, its transfer to the devices begun; waiting is counted."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        log.waited(time.perf_counter() - began)
        if batch is None:
            return
        arrays = {"image": batch.image, "label": batch.label, "is_pseudo": batch.is_pseudo}
        yield mesh_lib.to_devices(arrays, mesh), batch.ids


class _Log:
    """Reads metrics one step late, checks them, and writes their means every so often."""

    def __init__(
        self,
        stage: Stage,
        program: Program,
        writer: metric_writers.MetricWriter,
        say: Callable[[str], None],
        first: int,
        train_config: Any,
    ):
        self._stage = stage
        self._program = program
        self._writer = writer
        self._say = say
        self._config = train_config
        self._pending: collections.deque = collections.deque()
        self._window: list[dict[str, float]] = []
        self._wait = 0.0
        self._since = time.perf_counter()
        self._began = (first, self._since)
        size = program.streams.size("weak") + program.streams.size("strong")
        self._images_per_step = size
        self._progress = periodic_actions.ReportProgress(
            num_train_steps=stage.steps, writer=writer, every_secs=60.0
        )
        self._profile = None
        # Only where the stage lasts long enough for the profile to end in it.
        if 0 < train_config.profile_at <= stage.steps - PROFILED_STEPS:
            self._profile = periodic_actions.Profile(
                logdir=str(stage.folder),
                num_profile_steps=PROFILED_STEPS,
                first_profile=train_config.profile_at,
                every_secs=None,
                profile_duration_ms=None,
            )

    def waited(self, seconds: float) -> None:
        """Counts time spent waiting for the input pipeline."""
        self._wait += seconds

    def dispatched(self, step: int, metrics: steps.Metrics, ids: tuple[str, ...]) -> None:
        """Takes the metrics of a step that is under way; reads those of the step before."""
        self._pending.append((step, metrics, ids))
        while len(self._pending) > 1:
            self._read()
        self._progress(step)
        if self._profile:
            self._profile(step)

    def settle(self) -> None:
        """Reads all that is under way."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, metrics, ids = self._pending.popleft()
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if not (np.isfinite(values["loss"]) and np.isfinite(values["gradient_norm"])):
            rates = "teacher" if self._stage.kind == "teacher" else "student"
            raise UserError(
                f"The loss of {self._stage.name} is not finite at step {step} (images "
                f"{', '.join(ids)}): lower optim.{rates}.learning_rate or "
                "look at these images; the checkpoints before it are kept."
            )
        self._window.append(values)
        if step % self._config.log_every == 0 or step == self._stage.steps:
            self._write(step)

    def _write(self, step: int) -> None:
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        means = {k: float(np.mean([w[k] for w in self._window])) for k in self._window[0]}
        rate = len(self._window) / seconds
        scalars = means | {
            "learning_rate": float(self._program.schedule(step - 1)),
            "images_per_second": rate * self._images_per_step,
            "input_wait": self._wait / seconds,
        }
        self._writer.write_scalars(step, scalars)
        self._writer.flush()
        first, began = self._began
        left = (now - began) / (step - first) * (self._stage.steps - step)
        self._say(
            f"step {step}/{self._stage.steps}  loss {means['loss']:.3f}  "
            f"{scalars['images_per_second']:.1f} images/s  input wait "
            f"{100 * scalars['input_wait']:.0f}%  {left / 60:.1f} min left"
        )
        self._window, self._wait, self._since = [], 0.0, now
