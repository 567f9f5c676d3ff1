"""Says after the first steps of a run how long it will take on this machine."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging
from jax.sharding import Mesh

from semiseg_jax.data.dataset import Dataset
from semiseg_jax.planning import chips, run_time, work, workload
from semiseg_jax.planning.chips import Topology
from semiseg_jax.planning.meter import Meter
from semiseg_jax.planning.run_time import PartTime, Speed
from semiseg_jax.planning.work import Part, ProgramId
from semiseg_jax.planning.workload import Workload
from semiseg_jax.run_observer import RunObserver
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.logger import log_prefix, logger
from semiseg_jax.stages import Stage

# A further forecast is announced if the time of the whole run differs by more than this share.
CHANGE = 0.1


class Announcer(RunObserver):
    """Measures the first steps of each kind of work, and announces the time of the run.

    Process 0 alone measures. A thread counts the arithmetic of the programs while the first of them
    is compiled, so that no step waits for it.

    Attributes:
        speed: what was measured so far; None until the arithmetic is counted. May be set before the
            run starts.

    Args:
        began: when the command started, by the clock.
        clock: returns seconds.
    """

    def __init__(self, began: float | None = None, clock: Callable[[], float] = time.perf_counter):
        self.speed: Speed | None = None
        self._clock = clock
        self._began = clock() if began is None else began
        self._parts: tuple[Part, ...] = ()
        self._announced: float | None = None
        self._is_resumed = False
        # Of the part that the run is at.
        self._part_began = self._began
        self._meter = Meter(clock)
        self._left_in_part = 1.0
        self._evaluated: set[ProgramId] = set()
        self._last_evaluation: float | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def elapsed(self) -> float:
        """Returns the seconds since the command started."""
        return self._clock() - self._began

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Surrounds the run; ends the counting thread with it."""
        try:
            yield
        finally:
            self._stopped.set()
            if self._thread:
                self._thread.join()

    # ---- what the run tells

    def on_run(self, config: Any, dataset: Dataset, mesh: Mesh, schedule: Sequence[Stage]) -> None:
        """Starts to count the arithmetic of the programs."""
        if not multihost.is_main():
            return
        topology = chips.this_machine(mesh)
        load = workload.from_dataset(config, dataset)
        self._parts = parts = work.parts(config, load, schedule)
        self._is_resumed = any(stage.folder.exists() for stage in schedule)
        if self.speed is None:
            self._thread = threading.Thread(
                target=self._count, args=(config, load, parts, topology), daemon=True
            )
            self._thread.start()

    def _count(
        self, config: Any, load: Workload, parts: Sequence[Part], topology: Topology
    ) -> None:
        try:
            costs = run_time.count_costs(config, load, parts, topology, self._stopped.is_set)
        except Exception:  # A forecast must not end a run.
            logging.exception("The arithmetic of the programs could not be counted")
            return
        if not self._stopped.is_set():
            self.speed = Speed(costs, {})

    def on_labels(self, student: Stage) -> None:
        """A part of labelling begins."""
        self._begin(work.name_of_labels(student))

    def on_stage(self, stage: Stage) -> None:
        """A stage begins."""
        self._begin(stage.name)

    def on_images(self, done: int, total: int) -> None:
        """Measures labelling."""
        if not self._parts or self._parts[0].kind != work.LABELS:
            return
        part = self._parts[0]
        self._left_in_part = 1 - done / total
        seconds = self._meter.update(done, done == total)
        if seconds is None or self.speed is None or not part.passes:
            return
        cost = self.speed.costs[part.passes[0].program]
        batches = part.passes[0].batches(cost.images, cost.size)
        self._measured({part.passes[0].program: seconds * part.passes[0].images / batches})

    def on_step(self, step: int) -> None:
        """Measures training."""
        if not self._parts:
            return
        part = self._parts[0]
        assert part.step is not None
        self._left_in_part = 1 - step / part.steps
        seconds = self._meter.update(step, step == part.steps)
        if seconds is not None and self.speed is not None:
            start = max(self._meter.start_seconds - seconds, 0.0)
            # Students after the first find their program compiled.
            is_first = part.kind != "student" or part.round == 1 or self.speed.start is None
            self._measured({part.step: seconds}, start if is_first else None)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Measures an evaluation that compiles nothing any more."""
        began = self._clock()
        yield
        seconds = self._clock() - began
        self._meter.pause(seconds)
        if not self._parts or self.speed is None:
            return
        self._last_evaluation = self._clock()
        passes = self._parts[0].passes
        if not passes:
            return
        program = passes[0].program
        if program in self._evaluated:
            cost = self.speed.costs[program]
            batches = sum(p.batches(cost.images, cost.size) for p in passes)
            self.speed = self.speed.with_measured({program: seconds / batches})
        self._evaluated.add(program)

    def on_end(self, stage: Stage) -> None:
        """Leaves out the parts up to this stage."""
        names = [part.name for part in self._parts]
        if stage.name in names:
            self._parts = self._parts[names.index(stage.name) + 1 :]
        if self.speed and self._last_evaluation:
            seconds = self._clock() - self._last_evaluation
            self.speed = dataclasses.replace(self.speed, part=seconds)
        self._last_evaluation = None

    # ---- what is announced

    def _begin(self, name: str) -> None:
        names = [part.name for part in self._parts]
        if name in names:
            self._parts = self._parts[names.index(name) :]
        self._part_began, self._left_in_part = self._clock(), 1.0
        labels = bool(self._parts) and self._parts[0].kind == work.LABELS
        self._meter = Meter(self._clock, takes_median=labels)

    def _measured(self, seconds: dict[ProgramId, float], start: float | None = None) -> None:
        """Takes a measured program into account, and announces the forecast if it is news."""
        assert self.speed is not None
        self.speed = self.speed.with_measured(seconds, start)
        self._meter.stop()
        times = self._remaining()
        left = sum(time.seconds for time in times)
        total = self.elapsed() + left
        before = self._announced
        if before is not None and abs(total - before) <= CHANGE * before:
            return
        self._announced = total
        if before is None and not self._is_resumed:
            elapsed = self._clock() - self._part_began
            whole = (PartTime(times[0].part, times[0].seconds + elapsed), *times[1:])
            line = f"This run takes {run_time.describe(whole, total)}."
        else:
            line = f"The rest of this run takes {run_time.describe(times)}."
        with log_prefix(""):  # It is not about the present stage alone.
            logger.info(line)

    def _remaining(self) -> tuple[PartTime, ...]:
        """Returns the seconds of what is left of the present part, and of those after it."""
        assert self.speed is not None
        present, *later = self._parts
        left = self._left_in_part
        passes = present.passes
        if present.kind == work.LABELS:
            passes = tuple(dataclasses.replace(p, count=left * p.count) for p in passes)
        else:
            passes = tuple(
                dataclasses.replace(p, count=max(round(left * p.count), 1)) for p in passes
            )
        steps = round(left * present.steps)
        present = dataclasses.replace(present, steps=steps, passes=passes)
        return run_time.forecast((present, *later), self.speed, has_begun=True)
