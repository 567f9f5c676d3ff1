"""Lower bound on the duration of a run: the roofline of each program times its number of calls.

A program cannot be faster than its arithmetic at the chip's peak rate, than its main-memory traffic
at the memory bandwidth, or than its collectives at the link bandwidth. The largest of the three is
its bound. Imperfect overlap, waiting for the host and poorly filled units add to it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from semiseg_jax import stages
from semiseg_jax.planning import work
from semiseg_jax.planning.chips import Chip, Topology
from semiseg_jax.planning.programs import Cost, Counted, Program
from semiseg_jax.planning.work import Part, Pass
from semiseg_jax.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds on the duration of one call of a program, in seconds, by resource."""

    arithmetic: float
    memory: float
    links: float

    @property
    def bound(self) -> float:
        """The largest of the three, in seconds."""
        return max(self.arithmetic, self.memory, self.links)

    @property
    def limited_by(self) -> str:
        """Name of the resource with the largest bound."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roofline(cost: Cost | Counted, chip: Chip, num_devices: int) -> Roofline:
    """Returns the roofline of a program.

    Args:
        cost: cost of the program on one chip; a `Counted` one has only an arithmetic bound.
        chip: rates of the chip.
        num_devices: number of devices that take part in collectives.
    """
    if isinstance(cost, Counted):
        return Roofline(cost.flops / chip.flops, 0.0, 0.0)
    # Traffic that stays on the chip does not wait for the main memory.
    traffic = cost.traffic if cost.main_traffic is None else cost.main_traffic
    assert traffic is not None  # every compiled program has one of the two
    return Roofline(
        cost.flops / chip.flops,
        traffic / chip.memory_rate,
        bytes_sent(cost.collectives, num_devices) / chip.link_rate,
    )


def bytes_sent(collectives: dict[str, tuple[int, int]], num_devices: int) -> float:
    """Returns the bytes that each chip sends at least, over all its links.

    Source: ring algorithms, which are optimal in bytes (Thakur et al., IJHPCA 2005): an all-reduce
    is a reduce-scatter and an all-gather, each of which sends all but a chip's own shard.
    """
    others = (num_devices - 1) / num_devices
    # The operand of an all-gather is one chip's shard; of the other collectives, the whole array.
    factors = {"all-reduce": 2 * others, "all-gather": num_devices - 1, "reduce-scatter": others}
    factors["all-to-all"] = others
    return sum(size * factors.get(kind, 1) for kind, (_, size) in collectives.items())


@dataclasses.dataclass(frozen=True)
class WorkItem:
    """One kind of work in a run.

    Attributes:
        name: such as "students, 3 × 20,000 steps".
        seconds: lower bound on its duration in the whole run.
    """

    name: str
    seconds: float


def schedule(
    config: Any, load: Workload, compiled: list[Program], topology: Topology
) -> list[WorkItem]:
    """Returns the work of a run, each kind with a lower bound on its duration.

    If teacher and student have the same network, the teacher's step is the student's step scaled by
    its share of the images. Averaging, arg max and counting after the networks are ignored.

    Args:
        config: the whole config.
        load: numbers and sizes of the images.
        compiled: the programs; each fits or was only counted.
        topology: a topology of TPU chips.
    """
    parts = work.parts(config, load, stages.schedule(config, ""))
    items = []
    for kind in ("teacher", "student", work.LABELS, "control"):
        of_kind = [part for part in parts if part.kind == kind]
        if kind == work.LABELS:
            passes = [p for part in of_kind for p in part.passes]
            seconds = sum(_pass_seconds(p, compiled, topology) for p in passes)
            name = f"labelling, {len(of_kind)} × {load.unlabeled:,} images"
        else:
            of_kind = [part for part in of_kind if part.steps]
            seconds = sum(_steps_seconds(config, part, compiled, topology) for part in of_kind)
            name = _name_of_steps(kind, of_kind)
        if of_kind:
            items.append(WorkItem(name, seconds))
    for kind in ("evaluation", "choosing weights"):
        passes = [p for part in parts for p in part.passes if p.name == kind]
        if passes:
            seconds = sum(_pass_seconds(p, compiled, topology) for p in passes)
            count = sum(p.count for p in passes)
            items.append(WorkItem(f"{kind}, {count:g} × {passes[0].images:,} images", seconds))
    return items


def _name_of_steps(kind: str, parts: Sequence[Part]) -> str:
    if kind == "student" and parts:
        return f"students, {len(parts)} × {parts[0].steps:,} steps"
    return f"{kind}, {sum(part.steps for part in parts):,} steps"


def _steps_seconds(config: Any, part: Part, compiled: list[Program], topology: Topology) -> float:
    """Returns the seconds of all steps of a stage."""
    assert part.step is not None
    own = [p for p in compiled if p.kind == part.step.kind]
    program = own[0] if own else next(p for p in compiled if p.kind == "student step")
    seconds = part.steps * _bound_seconds(program, topology)
    return seconds if own else seconds * config.train.batch_labeled / program.images


def _pass_seconds(passes: Pass, compiled: list[Program], topology: Topology) -> float:
    """Returns the seconds of passes over a set of images; see `Pass.batches`."""
    scales = [p for p in compiled if (p.kind, p.backbone) == passes.program]
    batches = passes.count * passes.batches(scales[0].images, scales[0].size)
    return batches * sum(_bound_seconds(p, topology) for p in scales)


def _bound_seconds(program: Program, topology: Topology) -> float:
    assert isinstance(program.cost, Cost | Counted) and topology.chip
    return roofline(program.cost, topology.chip, len(topology.devices)).bound
