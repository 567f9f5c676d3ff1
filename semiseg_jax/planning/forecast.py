"""How long a run takes at least: the floor of each of its programs, times how often it runs.

A program cannot be faster than its arithmetic at the chip's peak, than its traffic with the main
memory at that memory's rate, or than its collectives at the rate of the links. The largest of the
three is its bound. What overlaps badly, waits for the host or fills the units badly comes on top.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from semiseg_jax.planning import programs
from semiseg_jax.planning.chips import Chip, Topology
from semiseg_jax.planning.programs import Cost, Counted, Program
from semiseg_jax.planning.workload import Size, Workload


@dataclasses.dataclass(frozen=True)
class Floors:
    """Seconds that one run of a program takes at least, by what limits it."""

    arithmetic: float
    memory: float
    links: float

    @property
    def bound(self) -> float:
        """The largest of them."""
        return max(self.arithmetic, self.memory, self.links)

    @property
    def limited_by(self) -> str:
        """Which one that is."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def floors(cost: Cost | Counted, chip: Chip, devices: int) -> Floors:
    """The floors of a program on chips of a kind.

    Args:
        cost: of the program, on one chip; of what was only counted arithmetic is the one floor.
        chip: its rates.
        devices: over which collectives go.
    """
    if isinstance(cost, Counted):
        return Floors(cost.flops / chip.flops, 0.0, 0.0)
    # What stays on the chip does not wait for its main memory.
    moved = cost.traffic if cost.main_traffic is None else cost.main_traffic
    assert moved is not None  # one of both is known of every program
    return Floors(
        cost.flops / chip.flops,
        moved / chip.memory_rate,
        sent(cost.collectives, devices) / chip.link_rate,
    )


def sent(collectives: dict[str, tuple[int, int]], devices: int) -> float:
    """Bytes that each chip sends at least, over all its links.

    Source: ring algorithms, which are optimal in bytes (Thakur et al., IJHPCA 2005): an all-reduce
    is a reduce-scatter and an all-gather, each of which sends all but a chip's own part.
    """
    others = (devices - 1) / devices
    # Operands of an all-gather are one chip's part, those of the others the whole.
    factors = {"all-reduce": 2 * others, "all-gather": devices - 1, "reduce-scatter": others}
    factors["all-to-all"] = others
    return sum(size * factors.get(kind, 1) for kind, (_, size) in collectives.items())


@dataclasses.dataclass(frozen=True)
class Part:
    """One kind of work in a run.

    Attributes:
        name: such as "students, 3 × 20,000 steps".
        seconds: in the whole run.
    """

    name: str
    seconds: float


def schedule(config: Any, load: Workload, found: list[Program], topology: Topology) -> list[Part]:
    """What a run consists of, and how long each part takes at least.

    The teacher's step is taken from the student's, by its share of the images, where both have one
    network. Averaging, arg max and counting behind the networks are left out.

    Whenever weights are evaluated, `eval.select=holdout` also sees the images held out to choose
    them by. `reported` chooses by the very evaluation that is reported, and sees none twice.

    Args:
        config: the whole config.
        load: how many images there are.
        found: the programs, each of which fits or was only counted.
        topology: with a chip.
    """
    rounds, train = config.rounds, config.train
    teacher, student = (_step_seconds(config, kind, found, topology) for kind in KINDS)
    first, later = (programs.backbone_of(config, kind) for kind in KINDS)
    parts = [Part(f"teacher, {train.teacher_steps:,} steps", train.teacher_steps * teacher)]
    if rounds.count:
        name = f"students, {rounds.count} × {train.steps:,} steps"
        parts.append(Part(name, rounds.count * train.steps * student))
    if rounds.count and takes_pseudo_labels(config):
        once = _pass_seconds("labelling", load.label_sizes, found, topology)
        # The last student labels nothing; an only one's network has no program for it.
        seconds = sum(map(once, [first] + [later] * (rounds.count - 1)))
        parts.append(Part(f"labelling, {rounds.count} × {load.unlabeled:,} images", seconds))
    control = bool(rounds.control and rounds.count)
    if control:
        steps = rounds.count * train.steps
        parts.append(Part(f"control, {steps:,} steps", steps * teacher))
    of_first = _evaluations(config, train.teacher_steps)
    if control:
        of_first += _evaluations(config, rounds.count * train.steps)
    of_later = rounds.count * _evaluations(config, train.steps)
    sets = {"evaluation": load.evaluation_sizes, "choosing weights": load.selection_sizes}
    for name, sizes in sets.items():
        if sizes:
            once = _pass_seconds("evaluation", sizes, found, topology)
            seconds = of_first * once(first) + (of_later * once(later) if of_later else 0)
            images = f"{of_first + of_later} × {sum(sizes.values()):,} images"
            parts.append(Part(f"{name}, {images}", seconds))
    return parts


KINDS = ("teacher", "student")


def takes_pseudo_labels(config: Any) -> bool:
    """Whether students see pseudo-labelled images."""
    return "pseudo" in (*config.data.weak_stream, *config.data.strong_stream)


def _evaluations(config: Any, steps: int) -> int:
    """Of a stage: those inside it, and that at its end."""
    every = config.eval.every
    return 1 + ((steps - 1) // every if every else 0)


def _step_seconds(config: Any, kind: str, found: list[Program], topology: Topology) -> float:
    own = [p for p in found if p.kind == f"{kind} step"]
    program = own[0] if own else next(p for p in found if p.kind == "student step")
    seconds = _bound(program, topology)
    return seconds if own else seconds * config.train.batch_labeled / program.images


def _pass_seconds(
    kind: str, sizes: dict[Size, int], found: list[Program], topology: Topology
) -> Callable[[str], float]:
    """A function from a backbone to the seconds of one pass over a set.

    Images of other sizes than the program's count by their pixels; the tail of a size fills a
    batch.
    """
    if not sum(sizes.values()):
        return lambda backbone: 0.0

    def seconds(backbone: str) -> float:
        mine = [p for p in found if p.kind == kind and p.backbone == backbone]
        height, width = mine[0].size
        batches = sum(
            -(-count // mine[0].images) * (size[0] * size[1]) / (height * width)
            for size, count in sizes.items()
        )
        return batches * sum(_bound(p, topology) for p in mine)

    return seconds


def _bound(program: Program, topology: Topology) -> float:
    assert isinstance(program.cost, Cost | Counted) and topology.chip
    return floors(program.cost, topology.chip, len(topology.devices)).bound
