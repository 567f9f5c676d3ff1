"""A plan as a table for people, and as JSON."""

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from semiseg_jax.planning import forecast
from semiseg_jax.planning.chips import Topology
from semiseg_jax.planning.forecast import Floors, Part
from semiseg_jax.planning.programs import Cost, Counted, Program, TooLarge
from semiseg_jax.planning.remedies import Remedy, fits
from semiseg_jax.planning.workload import Workload

GIB = 2**30
# Chips for which the step is foretold from what one of them does.
SLICES = (4, 16, 64, 256)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a config on a topology.

    Attributes:
        topology: that it was compiled for.
        load: what the run is about.
        parameters: of the student's network.
        limit: bytes of memory that a chip has; of the machine, for the CPU.
        programs: as the config has them.
        remedies: by the name of a program that does not fit: what was tried.
        parts: of the run; empty where a program does not fit or was left out, or no rates are
            published.
    """

    topology: Topology
    load: Workload
    parameters: int
    limit: int
    programs: tuple[Program, ...]
    remedies: dict[str, list[Remedy]]
    parts: tuple[Part, ...]

    @property
    def images_per_second(self) -> float | None:
        """Of the student's step at its bound; None without published rates or where none fits."""
        step = next(p for p in self.programs if p.kind == "student step")
        found = self.floors(step)
        return step.images / found.bound if found else None

    def floors(self, program: Program) -> Floors | None:
        """Of a program; None for the CPU, and for one that does not fit."""
        if self.topology.chip is None or isinstance(program.cost, TooLarge):
            return None
        return forecast.floors(program.cost, self.topology.chip, len(self.topology.devices))

    def bounds_by_chips(self) -> dict[int, float]:
        """Seconds of the student's step at its bound by chips, with as many images on each.

        Arithmetic and memory traffic of a chip stay what they are, and so do the bytes that
        collectives reduce; what a chip sends of them grows as 2 (n - 1) / n (see `forecast.sent`).
        """
        step = next(p for p in self.programs if p.kind == "student step")
        if self.topology.chip is None or not isinstance(step.cost, Cost):
            return {}
        chip = self.topology.chip
        return {n: forecast.floors(step.cost, chip, n).bound for n in SLICES}

    def fits(self, program: Program) -> bool:
        """Whether the compiler placed it, within the limit."""
        return fits(program.cost, self.limit)


def show(plan: Plan, supplied: float | None, why_not: str, layers: int = 0) -> None:
    """Prints a plan.

    Args:
        plan: what to print.
        supplied: images a second that the input pipeline gives here; None where not measured.
        why_not: the reason for that.
        layers: how many layers of the student's step to list, by what they move.
    """
    console = Console(highlight=False, soft_wrap=True)
    # A table that is cut into pieces cannot be read; a terminal scrolls.
    console.width = max(console.width, 160)
    devices, hosts = len(plan.topology.devices), plan.topology.hosts
    load = plan.load
    chosen_by = f", {load.selected:,} to choose weights by" if load.selected else ""
    console.print(
        f"\n{plan.topology.name}: {devices} chip(s) on {hosts} host(s); {plan.parameters:,} "
        f"parameters; {load.labeled:,} labelled, {load.unlabeled:,} unlabelled, "
        f"{load.evaluated:,} evaluation images{chosen_by}, {load.classes} classes"
    )
    for sentence in load.assumed:
        console.print(sentence)
    console.print(_programs_table(plan))
    if any(isinstance(p.cost, Cost) and p.cost.traffic is None for p in plan.programs):
        console.print("Memory is without the programs' code; --machine-code also makes that.")
    for sentence in _remedies(plan):
        console.print(sentence)
    if layers:
        console.print(_layers_table(plan, layers))
    if plan.parts:
        console.print(_schedule_table(plan))
        if any(isinstance(p.cost, Counted) for p in plan.programs):
            console.print("What was not compiled is bound by its arithmetic alone in these hours.")
    if bounds := plan.bounds_by_chips():
        by_chips = ", ".join(f"{n} chips {1e3 * s:,.1f} ms" for n, s in bounds.items())
        console.print(f"The student's step with as many images a chip, at its bound: {by_chips}.")
    here = why_not if supplied is None else f"here it supplies {supplied:,.1f} images/s"
    if needed := plan.images_per_second:
        console.print(
            f"At its bound the student's step takes {needed / hosts:,.0f} images/s from each "
            f"host's input pipeline; {here}."
        )
    elif supplied is not None:
        console.print(f"The input pipeline: {here}.")


def _programs_table(plan: Plan) -> Table:
    """A column for each program, all figures on one chip but images and images/s."""
    names = [p.name.replace(" ", "\n", 1) for p in plan.programs]
    columns = [Column(name, justify="right") for name in names]
    table = Table(Column("on one chip"), *columns, box=box.SIMPLE_HEAD)
    sizes = [f"{p.images} of {p.size[1]}x{p.size[0]}" for p in plan.programs]
    table.add_row("images, on all chips", *sizes)
    if len({p.backbone for p in plan.programs}) > 1:
        table.add_row("network", *(p.backbone for p in plan.programs))
    columns_of_cells = [_cells(plan, program) for program in plan.programs]
    for row in dict.fromkeys(name for cells in columns_of_cells for name in cells):
        table.add_row(row, *(cells.get(row, "") for cells in columns_of_cells))
    return table


def _cells(plan: Plan, program: Program) -> dict[str, str]:
    """What a program's column says, by the name of the row."""
    cost, limit = program.cost, f"{plan.limit / GIB:.1f}"
    found = plan.floors(program)
    if isinstance(cost, Counted):
        assert found is not None  # only for chips is a program counted alone
        return {
            "GFLOP of products, counted": f"{cost.flops / 1e9:,.1f}",
            "floor of arithmetic, ms": f"{1e3 * found.arithmetic:,.2f}",
        }
    fits = {f"fits in {limit} GiB": "yes" if plan.fits(program) else "no"}
    cells = {"memory, GiB": _memory(cost)} | fits
    if not isinstance(cost, Cost):
        return cells
    cells["GFLOP of products, counted"] = f"{cost.flops / 1e9:,.1f}"
    if cost.compiler_flops is not None:
        cells["GFLOP, the compiler's figure"] = f"{cost.compiler_flops / 1e9:,.1f}"
    if cost.traffic is not None:
        cells["memory traffic, GB"] = f"{cost.traffic / 1e9:,.2f}"
    if cost.main_traffic is not None:
        cells["operands and results, GB"] = f"{cost.moved / 1e9:,.2f}"
        cells["of it with main memory, GB"] = f"{cost.main_traffic / 1e9:,.2f}"
    for kind, (count, size) in cost.collectives.items():
        cells[f"{kind}s, MB"] = f"{size / 1e6:,.2f} in {count}"
    if found is None:
        return cells
    for name, seconds in dataclasses.asdict(found).items():
        cells[f"floor of {name}, ms"] = f"{1e3 * seconds:,.2f}"
    cells["bound, ms"] = f"{1e3 * found.bound:,.2f}"
    return cells | {
        "limited by": found.limited_by,
        "images/s, at most": f"{program.images / found.bound:,.0f}",
    }


def _memory(cost: Cost | TooLarge | Counted) -> str:
    """In GiB; "more" where the compiler did not say how much more than there is."""
    match cost:
        case Cost():
            size = cost.memory.total
        case TooLarge():
            size = cost.needed
        case Counted():
            return "not known"
    return f"{size / GIB:.2f}" if size else "more"


def _layers_table(plan: Plan, count: int) -> Table:
    """The layers of the student's step that move most; operands that are read in part are whole."""
    right = [Column(name, justify="right") for name in ("GB", "of it with main memory")]
    table = Table(Column("student step: layer"), *right, box=box.SIMPLE_HEAD)
    cost = next(p.cost for p in plan.programs if p.kind == "student step")
    for layer, sizes in list(cost.by_layer.items())[:count] if isinstance(cost, Cost) else ():
        table.add_row(layer, *(f"{size / 1e9:,.3f}" for size in sizes))
    return table


def _schedule_table(plan: Plan) -> Table:
    right = [Column(name, justify="right") for name in ("hours", "chip-hours")]
    table = Table(Column("the run, at least"), *right, box=box.SIMPLE_HEAD)
    devices = len(plan.topology.devices)
    total = Part("all", sum(part.seconds for part in plan.parts))
    for part in (*plan.parts, total):
        hours = part.seconds / 3600
        table.add_row(part.name, f"{hours:.2f}", f"{hours * devices:.1f}")
    return table


def _remedies(plan: Plan) -> list[str]:
    """A line for each change that was tried, and one that says the smallest that fits."""
    lines = []
    for name, remedies in plan.remedies.items():
        for remedy in remedies:
            lines.append(
                f"{name} with {remedy}: {_memory(remedy.program.cost)} GiB, "
                f"{'fits' if remedy.fits else 'does not fit'}"
            )
        good = next((remedy for remedy in remedies if remedy.fits), None)
        lines.append(
            f"{name} does not fit; the smallest change that makes it fit: {good}"
            if good
            else f"{name} does not fit, with none of these changes: take more or larger chips."
        )
    if any("train.accumulate" in r.change for tried in plan.remedies.values() for r in tried):
        lines.append(
            "With train.accumulate batch, loss and update stay what they are, but batch norm sees "
            "one micro-batch at a time."
        )
    return lines


def as_json(plan: Plan, supplied: float | None) -> dict[str, Any]:
    """The same as a JSON object; bytes, operations and seconds, on one chip unless it says so."""
    return {
        "topology": plan.topology.name,
        "chips": len(plan.topology.devices),
        "hosts": plan.topology.hosts,
        "rates": dataclasses.asdict(plan.topology.chip) if plan.topology.chip else None,
        "parameters": plan.parameters,
        "memory_limit": plan.limit,
        "workload": {
            "classes": plan.load.classes,
            "labeled": plan.load.labeled,
            "unlabeled": plan.load.unlabeled,
            "evaluated": plan.load.evaluated,
            "selected": plan.load.selected,
            "assumed": list(plan.load.assumed),
        },
        "programs": [_program_as_json(plan, program) for program in plan.programs],
        "remedies": {
            name: [
                {"change": r.change, "fits": r.fits, **_program_as_json(plan, r.program)}
                for r in remedies
            ]
            for name, remedies in plan.remedies.items()
        },
        "schedule": [dataclasses.asdict(part) for part in plan.parts],
        "hours": sum(part.seconds for part in plan.parts) / 3600 if plan.parts else None,
        "student_step_seconds_by_chips": plan.bounds_by_chips(),
        "images_per_second": plan.images_per_second,
        "input_images_per_second_here": supplied,
    }


def _program_as_json(plan: Plan, program: Program) -> dict[str, Any]:
    found = plan.floors(program)
    described = dataclasses.asdict(program)
    floors = dataclasses.asdict(found) | {"bound": found.bound} if found else None
    placed = None if isinstance(program.cost, Counted) else plan.fits(program)
    return described | {"name": program.name, "fits": placed, "floors": floors}
