"""Lower bound on the duration of a run: the roofline of each program times its number of calls.

A program cannot be faster than its arithmetic at the chip's peak rate, than its main-memory traffic
at the memory bandwidth, or than its collectives at the link bandwidth. The largest of the three is
its bound. Imperfect overlap, waiting for the host and poorly filled units add to it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from semiseg_jax import stages
from semiseg_jax.planning.chips import Chip, Topology
from semiseg_jax.planning.programs import Cost, Counted, Program
from semiseg_jax.planning.workload import Size, Workload


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

    With `eval.select=holdout` each evaluation also reads the held-out images. With `reported` the
    reported evaluation itself selects the weights, and no image is evaluated twice.

    Args:
        config: the whole config.
        load: numbers and sizes of the images.
        compiled: the programs; each fits or was only counted.
        topology: a topology of TPU chips.
    """
    rounds, train = config.rounds, config.train
    teacher_step, student_step = (
        _step_seconds(config, kind, compiled, topology) for kind in ("teacher", "student")
    )
    first_backbone = stages.stage_backbone(config, "teacher")
    later_backbone = stages.stage_backbone(config, "student")
    teacher_name = f"teacher, {train.teacher_steps:,} steps"
    items = [WorkItem(teacher_name, train.teacher_steps * teacher_step)]
    if rounds.count:
        name = f"students, {rounds.count} × {train.steps:,} steps"
        items.append(WorkItem(name, rounds.count * train.steps * student_step))
    if stages.takes_pseudo_labels(config):
        pass_seconds = _pass_seconds("labelling", load.label_sizes, compiled, topology)
        # The last student labels nothing, so a single student has no labelling program.
        labelers = [first_backbone] + [later_backbone] * (rounds.count - 1)
        name = f"labelling, {rounds.count} × {load.unlabeled:,} images"
        items.append(WorkItem(name, sum(map(pass_seconds, labelers))))
    has_control = bool(rounds.control and rounds.count)
    if has_control:
        steps = rounds.count * train.steps
        items.append(WorkItem(f"control, {steps:,} steps", steps * teacher_step))
    num_first = stages.num_evaluations(config, train.teacher_steps)
    if has_control:
        num_first += stages.num_evaluations(config, rounds.count * train.steps)
    num_later = rounds.count * stages.num_evaluations(config, train.steps)
    sets = {"evaluation": load.evaluation_sizes, "choosing weights": load.selection_sizes}
    for name, sizes in sets.items():
        if sizes:
            pass_seconds = _pass_seconds("evaluation", sizes, compiled, topology)
            seconds = num_first * pass_seconds(first_backbone)
            if num_later:
                seconds += num_later * pass_seconds(later_backbone)
            images = f"{num_first + num_later} × {sum(sizes.values()):,} images"
            items.append(WorkItem(f"{name}, {images}", seconds))
    return items


def _step_seconds(config: Any, kind: str, compiled: list[Program], topology: Topology) -> float:
    own = [p for p in compiled if p.kind == f"{kind} step"]
    program = own[0] if own else next(p for p in compiled if p.kind == "student step")
    seconds = _bound_seconds(program, topology)
    return seconds if own else seconds * config.train.batch_labeled / program.images


def _pass_seconds(
    kind: str, sizes: dict[Size, int], compiled: list[Program], topology: Topology
) -> Callable[[str], float]:
    """Returns a function from a backbone to the seconds of one pass over a set of images.

    Images of a size other than the program's are weighted by their pixels. The last batch of each
    size is padded to a full batch.
    """
    if not sum(sizes.values()):
        return lambda backbone: 0.0

    def seconds(backbone: str) -> float:
        scales = [p for p in compiled if p.kind == kind and p.backbone == backbone]
        height, width = scales[0].size
        batches = sum(
            -(-count // scales[0].images) * (size[0] * size[1]) / (height * width)
            for size, count in sizes.items()
        )
        return batches * sum(_bound_seconds(p, topology) for p in scales)

    return seconds


def _bound_seconds(program: Program, topology: Topology) -> float:
    assert isinstance(program.cost, Cost | Counted) and topology.chip
    return roofline(program.cost, topology.chip, len(topology.devices)).bound
