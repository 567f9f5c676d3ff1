"""One stage of a run: data, step, metrics, checkpoint, evaluation, until its last step."""

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
from clu import periodic_actions
from etils import epath
from jax.sharding import Mesh

from semiseg_jax import distributed, interruption, steps, summaries
from semiseg_jax import mesh as mesh_lib
from semiseg_jax import state as state_lib
from semiseg_jax.checkpoints import Checkpoints
from semiseg_jax.data import pipeline
from semiseg_jax.data.labels import write_bytes
from semiseg_jax.data.streams import Streams, stage_name
from semiseg_jax.errors import UserError
from semiseg_jax.history import History
from semiseg_jax.state import TrainState, Variables

PROFILED_STEPS = 5
# The file that a finished stage has, written last.
DONE = "DONE"

Batches = Callable[[range], Iterator[pipeline.TrainBatch]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage trains.

    Attributes:
        kind: "teacher", "student" or "control".
        round: 0 of the teacher, then that of the student; of the control, how many rounds it is
            to be compared with.
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
        """For people: "student 2", "control 2", "teacher"."""
        return stage_name(self.kind, self.round)


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
    score: Callable[[int, Variables], None],
    say: Callable[[str], None],
    train_config: Any,
    eval_every: int,
    mesh: Mesh,
    asked: interruption.Asked = interruption.never,
) -> Variables:
    """Trains a stage, from its newest checkpoint where it has one.

    The order of things, step by step: the batch is put on its way to the devices and the step
    dispatched; only then the metrics of the step before are read, so that the devices have work
    while the host reads, writes and makes the next batch; where due, metrics are written, then a
    checkpoint, then an evaluation is made. A checkpoint is written only after every step in it
    proved finite. A restart makes up for the evaluation that was cut off behind a checkpoint.

    Args:
        stage: what to train.
        program: its step.
        start: makes the variables of step 0; not called when a checkpoint is there.
        batches: this process's batches for a range of steps.
        score: evaluates variables at a step inside the stage and keeps the row; does nothing where
            there is one.
        say: prints a line of progress.
        train_config: `config.train`.
        eval_every: steps between evaluations inside the stage, 0 for none.
        mesh: to run on.
        asked: whether to stop.

    Returns:
        The variables after the last step.

    Raises:
        UserError: the loss is not finite; the batch is kept to look at.
        Interrupted: that was asked for; the last step is in a checkpoint.
    """

    def evaluation_is_due(step: int) -> bool:
        return bool(eval_every) and 0 < step < stage.steps and step % eval_every == 0

    key = jax.random.key(int(stage.seed[0]) & 0xFFFFFFFF)
    with Checkpoints(stage.folder / "checkpoints") as checkpoints:
        found = checkpoints.newest(state_shapes(program, mesh), say)
        if found:
            first, state = found
            say(f"going on at step {first}")
        else:
            first, state = 0, state_lib.create(start(), program.tx, mesh)
        if evaluation_is_due(first):
            score(first, state.variables)
        writer = summaries.Writer(stage.folder)
        log = _Log(stage, program, writer, say, first, train_config)
        ahead = _ahead(batches(range(first, stage.steps)), mesh, log)
        # Outside of the loop, so that leaving it by an exception closes the pipeline behind it.
        with contextlib.closing(ahead):
            for step, (arrays, batch) in zip(range(first + 1, stage.steps + 1), ahead, strict=True):
                state, metrics = program.step(state, arrays, key)
                log.dispatched(step, metrics, batch)
                stopping = asked()
                if step == stage.steps or step % train_config.checkpoint_every == 0 or stopping:
                    log.settle()
                    checkpoints.save(step, state)
                if stopping:
                    raise interruption.Interrupted
                if evaluation_is_due(step):
                    log.settle()
                    _score_or_save(score, step, state, checkpoints)
        log.settle()
        writer.close()
    return state.variables


def _score_or_save(
    score: Callable[[int, Variables], None], step: int, state: TrainState, checkpoints: Checkpoints
) -> None:
    """Evaluates; where that is interrupted, the step is kept, and a restart evaluates it."""
    try:
        score(step, state.variables)
    except interruption.Interrupted:
        if checkpoints.latest() != step:
            checkpoints.save(step, state)
        raise


def restore(
    stage: Stage, program: Program, mesh: Mesh, say: Callable[[str], None]
) -> Variables | None:
    """The variables of a finished stage; None where its last checkpoint is gone or damaged.

    Args:
        stage: with its folder.
        program: for the shapes of its state.
        mesh: to put them on.
        say: takes a line about a damaged checkpoint.
    """
    with Checkpoints(stage.folder / "checkpoints") as checkpoints:
        found = checkpoints.newest(state_shapes(program, mesh), say)
    return found[1].variables if found and found[0] == stage.steps else None


def state_shapes(program: Program, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and places of a stage's state."""
    whole = mesh_lib.replicated(mesh)
    create = functools.partial(state_lib.create, tx=program.tx, mesh=mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(create, program.shapes),
    )


def traced(program: Program, crop: tuple[int, int], mesh: Mesh) -> jax.stages.Traced:
    """The step of a stage, traced from shapes; nothing is computed.

    Args:
        program: of the stage.
        crop: (height, width) of its images, in pixels.
        mesh: to compile for.
    """
    images = program.streams.size("weak") + program.streams.size("strong")
    split = mesh_lib.split_by_image(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((images, *crop, 3), np.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct((images, *crop), np.uint8, sharding=split),
        "is_pseudo": jax.ShapeDtypeStruct((images,), np.bool_, sharding=split),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    step: Any = program.step
    return step.trace(state_shapes(program, mesh), batch, key)


def refuse_too_large(kind: str, step: jax.stages.Traced) -> None:
    """Compiles a step before anything runs, so that one without a place in memory is told then.

    The compiled step is kept on disk (`mesh.keep_compiled_programs`), and not compiled again.

    Args:
        kind: of the stage.
        step: from `traced`.

    Raises:
        UserError: a device has not the memory that the step needs.
    """
    found = mesh_lib.compiled(step)
    if isinstance(found, str):
        raise UserError(
            f"The {kind}'s step does not fit into the memory of a device "
            f"({found.splitlines()[0].rstrip('.')}): python -m semiseg_jax.plan with this config "
            "tells the smallest change that makes it fit a TPU; docs/own_data.md has what to lower "
            "elsewhere."
        )


def _ahead(
    batches: Iterator[pipeline.TrainBatch], mesh: Mesh, log: "_Log"
) -> Generator[tuple[dict[str, jax.Array], pipeline.TrainBatch], None, None]:
    """(arrays, batch) of each batch, its transfer to the devices begun; waiting is counted."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        log.waited(time.perf_counter() - began)
        if batch is None:
            return
        arrays = {"image": batch.image, "label": batch.label, "is_pseudo": batch.is_pseudo}
        yield mesh_lib.to_devices(arrays, mesh), batch


class _Log:
    """Reads metrics one step late, checks them, and writes their means every so often."""

    def __init__(
        self,
        stage: Stage,
        program: Program,
        writer: summaries.Writer,
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
        self._history = History(stage.folder, first)
        size = program.streams.size("weak") + program.streams.size("strong")
        self._images_per_step = size
        self._progress = periodic_actions.ReportProgress(
            num_train_steps=stage.steps, writer=writer, every_secs=60.0
        )
        self._profile = None
        # Only where the stage lasts long enough for the profile to end in it.
        lasts = 0 < train_config.profile_at <= stage.steps - PROFILED_STEPS
        if lasts and distributed.is_main():
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

    def dispatched(self, step: int, metrics: steps.Metrics, batch: pipeline.TrainBatch) -> None:
        """Takes the metrics of a step that is under way; reads those of the step before."""
        self._pending.append((step, metrics, batch))
        while len(self._pending) > 1:
            self._read()
        self._progress(step)
        if self._profile:
            with summaries.writing(self._stage.folder):
                self._profile(step)

    def settle(self) -> None:
        """Reads all that is under way."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, metrics, batch = self._pending.popleft()
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if not (np.isfinite(values["loss"]) and np.isfinite(values["gradient_norm"])):
            rates = "teacher" if self._stage.kind == "teacher" else "student"
            ids = itertools.chain(*distributed.gather("images of the batch", batch.ids))
            raise UserError(
                f"The loss of {self._stage.name} is not finite at step {step} (images "
                f"{', '.join(ids)}): look at this batch in {self._keep(step, batch)}, or "
                f"lower optim.{rates}.learning_rate with another --workdir; the checkpoints before "
                "it are kept."
            )
        self._window.append(values)
        if step % self._config.log_every == 0 or step == self._stage.steps:
            self._write(step)

    def _keep(self, step: int, batch: pipeline.TrainBatch) -> epath.Path:
        """Writes a batch to look at: image, label, is_pseudo, ids; the file's path.

        Of several processes each writes its own part.
        """
        part = f"_part_{distributed.index()}" if distributed.count() > 1 else ""
        path = self._stage.folder / f"not_finite_step_{step}{part}.npz"
        content = io.BytesIO()
        np.savez_compressed(content, **dataclasses.asdict(batch))
        write_bytes(path, content.getvalue())
        return path

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
        self._history.add(step, scalars | {"seconds": seconds})
        first, began = self._began
        left = (now - began) / (step - first) * (self._stage.steps - step)
        self._say(
            f"step {step}/{self._stage.steps}  loss {means['loss']:.3f}  "
            f"{scalars['images_per_second']:.1f} images/s  input wait "
            f"{100 * scalars['input_wait']:.0f}%  {left / 60:.1f} min left"
        )
        self._window, self._wait, self._since = [], 0.0, now
