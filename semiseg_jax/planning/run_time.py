"""The time of a run on this machine: the work of its parts times the measured speed.

A program costs the arithmetic of its convolutions and matrix products, which is counted from the
traced program (see `flops`). What was measured of one program predicts those that have not run:
seconds per operation of a training step hold for other training steps, those of inference for other
inference. Waiting for the input is a part of what is measured.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import stages
from semiseg_jax.planning import programs, work
from semiseg_jax.planning.chips import Topology
from semiseg_jax.planning.programs import Counted
from semiseg_jax.planning.work import Part, Pass, ProgramId
from semiseg_jax.planning.workload import Workload
from semiseg_jax.shape_buckets import Size

# Assumed until measured; see docs/scaling.md for the measurements.
# Seconds per operation of inference, relative to those of a training step.
INFERENCE_RATIO = 0.5
# Seconds until the first batch of inference at one scale and size, relative to those until the
# first step of a stage: both are mostly compilation.
INFERENCE_START_RATIO = 0.12
# Seconds until the first step of a further student, whose program is compiled, relative to those
# until the first step of a stage.
RESTART_RATIO = 0.2
# Seconds for the report and the checks of files around each part.
PART_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """What a program, or inference at all scales together, costs for a call.

    Attributes:
        flops: operations on one device.
        images: images of a call, over all devices.
        size: (height, width) of the images, in pixels.
        scales: number of programs; 1 for steps.
    """

    flops: float
    images: int
    size: Size
    scales: int = 1


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast programs run on this machine.

    Attributes:
        costs: of each program of the run.
        seconds: of a call, by measured program.
        start: seconds until the end of the first step beyond those of a step; None if no program
            was started.
        part: seconds of a part beside its programs.
    """

    costs: Mapping[ProgramId, ProgramCost]
    seconds: Mapping[ProgramId, float]
    start: float | None = None
    part: float = PART_SECONDS

    def with_measured(
        self, seconds: Mapping[ProgramId, float], start: float | None = None
    ) -> "Speed":
        """Returns the speed with further measured programs, and the seconds of a start if known."""
        merged = {**self.seconds, **seconds}
        start = self.start if start is None else start
        return dataclasses.replace(self, seconds=merged, start=start)

    def call_seconds(self, program: ProgramId) -> float:
        """Returns the seconds of a call: measured, or from the measured program most like it."""
        if program in self.seconds:
            return self.seconds[program]

        def distance(other: ProgramId) -> tuple[bool, bool, bool]:
            # First the same use, then the same network.
            same_use = other.is_step == program.is_step
            return not same_use, other.backbone != program.backbone, other.kind != program.kind

        nearest = min(self.seconds, key=distance)
        ratio = 1.0
        if program.is_step != nearest.is_step:
            ratio = 1 / INFERENCE_RATIO if program.is_step else INFERENCE_RATIO
        flops = self.costs[program].flops / self.costs[nearest].flops
        return ratio * flops * self.seconds[nearest]


@dataclasses.dataclass(frozen=True)
class PartTime:
    """The predicted seconds of a part of a run."""

    part: Part
    seconds: float


def forecast(parts: Sequence[Part], speed: Speed, has_begun: bool = False) -> tuple[PartTime, ...]:
    """Returns the seconds of each part, with the compilation of the programs that it uses first.

    Args:
        parts: of the run, or what is left of it.
        speed: of the programs.
        has_begun: the first part is under way: what it begins with is compiled.
    """
    used: set[tuple[str, ProgramId]] = set()
    if has_begun:
        used.update(_programs(parts[0])[:1])
    times = []
    for part in parts:
        seconds = speed.part + _start_seconds(part, speed, used)
        if part.step:
            seconds += part.steps * speed.call_seconds(part.step)
        seconds += sum(_pass_seconds(passes, speed) for passes in part.passes)
        times.append(PartTime(part, seconds))
    return tuple(times)


def _programs(part: Part) -> list[tuple[str, ProgramId]]:
    """Returns (use, program) in the order of their first calls.

    A control has the teacher's step with other learning rates, which is another program.
    """
    steps = [(part.kind, part.step)] if part.step else []
    return [*steps, *((passes.name, passes.program) for passes in part.passes)]


def _start_seconds(part: Part, speed: Speed, used: set[tuple[str, ProgramId]]) -> float:
    """Returns the seconds until the first results of a part's programs; adds these to `used`."""
    start, seconds = speed.start or 0.0, 0.0
    if part.step:
        seconds += start * (RESTART_RATIO if (part.kind, part.step) in used else 1.0)
    for passes in part.passes:
        if (passes.name, passes.program) not in used:
            num_programs = len(passes.sizes) * speed.costs[passes.program].scales
            seconds += start * INFERENCE_START_RATIO * num_programs
    used.update(_programs(part))
    return seconds


def _pass_seconds(passes: Pass, speed: Speed) -> float:
    cost = speed.costs[passes.program]
    batches = passes.count * passes.batches(cost.images, cost.size)
    return batches * speed.call_seconds(passes.program)


# ---------------------------------------------------------------- the cost of programs


def count_costs(
    config: Any,
    load: Workload,
    parts: Iterable[Part],
    topology: Topology,
    is_stopped: Callable[[], bool] = lambda: False,
) -> dict[ProgramId, ProgramCost]:
    """Counts the arithmetic of each program of a run, without compiling it.

    Of each network one step and one program of inference are traced, which takes seconds; the
    others follow from their pixels. With windows, which overlap, all inference is traced.

    Args:
        config: the whole config.
        load: sizes of the images.
        parts: of the run.
        topology: the devices of the run.
        is_stopped: asked before each program; if it is true, the others are left out.
    """
    parts = tuple(parts)
    used = [part.step for part in parts if part.step]
    used += [passes.program for part in parts for passes in part.passes]
    costs: dict[ProgramId, ProgramCost] = {}
    flops_per_pixel: dict[tuple[bool, str], float] = {}
    for program in dict.fromkeys(used):
        if is_stopped():
            break
        images, size, scales = _shape(config, load, program, topology)
        pixels = images * size[0] * size[1] * sum(scale**2 for scale in scales)
        network = program.is_step, program.backbone
        if not program.is_step and (config.pseudo.window or config.eval.window):
            flops = sum(
                _count(config, load, program, topology, scale) for scale in dict.fromkeys(scales)
            )
        else:
            if network not in flops_per_pixel:
                counted = _count(config, load, program, topology, scales[0])
                copies = scales.count(scales[0])
                counted_pixels = images * size[0] * size[1] * copies * scales[0] ** 2
                flops_per_pixel[network] = counted / counted_pixels
            flops = flops_per_pixel[network] * pixels
        costs[program] = ProgramCost(flops, images, size, len(set(scales)))
    return costs


def _shape(
    config: Any, load: Workload, program: ProgramId, topology: Topology
) -> tuple[int, Size, tuple[float, ...]]:
    """Returns the images of a call, their size, and the scale of each pass of the network."""
    if program.is_step:
        spec = stages.batch_spec(config, program.kind.removesuffix(" step"))
        return spec.num_images, tuple(config.data.crop), (1.0,)
    settings = config.pseudo if program.kind == "labelling" else config.eval
    sizes = programs.inference_sizes(load, program.kind)
    images = mesh_lib.round_up_batch(settings.batch, len(topology.devices))
    return images, programs.largest_size(sizes), settings.scales * (2 if settings.flip else 1)


def _count(
    config: Any, load: Workload, program: ProgramId, topology: Topology, scale: float
) -> float:
    """Returns the operations of a call on one device, from the traced program of a scale."""
    if program.is_step:
        kind = program.kind.removesuffix(" step")
        traced = programs.step_program(config, kind, load.classes, topology, "counted")
    else:
        config = config.copy_and_resolve_references()
        config.pseudo.scales = config.eval.scales = (scale,)
        (traced,) = programs.inference_programs(
            config, program.kind, program.backbone, load, topology, "counted"
        )
    assert isinstance(traced.cost, Counted)
    return traced.cost.flops


# ---------------------------------------------------------------- in words


def describe(times: Sequence[PartTime], total: float | None = None) -> str:
    """Returns such as "about 1 h 10 min on this machine: teacher 14 min, student 13 min".

    Args:
        times: of the parts, in order; those of a kind are added up.
        total: seconds, where the sum of the parts is not meant.
    """
    by_kind: dict[str, list[float]] = {}
    for time in times:
        by_kind.setdefault(time.part.kind, []).append(time.seconds)
    names = {"teacher": "teacher", work.LABELS: "pseudo-labels", "control": "control"}
    texts = []
    for kind in sorted(by_kind, key=["teacher", work.LABELS, "student", "control"].index):
        seconds = by_kind[kind]
        several = f"{len(seconds)} students" if len(seconds) > 1 else "student"
        texts.append(f"{names.get(kind, several)} {format_duration(sum(seconds))}")
    whole = sum(time.seconds for time in times) if total is None else total
    return f"about {format_duration(whole)} on this machine: {', '.join(texts)}"


def format_duration(seconds: float) -> str:
    """Formats a predicted duration with the digits that a prediction has: "40 s", "1 h 10 min"."""
    if seconds < 90:
        return f"{max(10 * round(seconds / 10), 10)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(5 * round(seconds / 300), 60)
    if hours < 10:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    hours = round(seconds / 3600)
    return f"{hours} h" if hours < 48 else f"{round(seconds / 86_400, 1):g} days"
