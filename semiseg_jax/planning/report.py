"""Prints a plan as tables and converts it to JSON."""

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from semiseg_jax.planning import forecast
from semiseg_jax.planning.chips import Topology
from semiseg_jax.planning.forecast import Roofline, WorkItem
from semiseg_jax.planning.programs import Cost, Counted, Program, TooLarge
from semiseg_jax.planning.suggestions import Suggestion, fits
from semiseg_jax.planning.workload import Workload

GIB = 2**30
# Numbers of chips for which the step time is predicted from the cost on one chip.
SLICES = (4, 16, 64, 256)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a config on a topology.

    Attributes:
        topology: devices that the programs were compiled for.
        load: numbers and sizes of the images.
        parameters: number of parameters of the student's network.
        limit: bytes of memory of a chip; of the machine, for the CPU.
        programs: programs of the config.
        suggestions: changes that were tried, by the name of the program that does not fit.
        schedule: work of the run; empty if a program does not fit, or on the CPU.
    """

    topology: Topology
    load: Workload
    parameters: int
    limit: int
    programs: tuple[Program, ...]
    suggestions: dict[str, list[Suggestion]]
    schedule: tuple[WorkItem, ...]

    @property
    def student_step(self) -> Program:
        """The student's step."""
        return next(p for p in self.programs if p.kind == "student step")

    @property
    def images_per_second(self) -> float | None:
        """Rate of the student's step at its bound; None on the CPU or if the step does not fit."""
        roofline = self.roofline(self.student_step)
        return self.student_step.images / roofline.bound if roofline else None

    @property
    def hours(self) -> float:
        """Lower bound on the duration of the run, in hours."""
        return sum(item.seconds for item in self.schedule) / 3600

    def roofline(self, program: Program) -> Roofline | None:
        """Returns the roofline of a program; None on the CPU or if the program does not fit."""
        if self.topology.chip is None or isinstance(program.cost, TooLarge):
            return None
        return forecast.roofline(program.cost, self.topology.chip, len(self.topology.devices))

    def bounds_by_chips(self) -> dict[int, float]:
        """Returns the bound of the student's step in seconds, by number of chips.

        The number of images per chip is constant, and so are the arithmetic, the memory traffic and
        the bytes that collectives reduce. The bytes that a chip sends grow as 2 (n - 1) / n (see
        `forecast.bytes_sent`).
        """
        cost, chip = self.student_step.cost, self.topology.chip
        if chip is None or not isinstance(cost, Cost):
            return {}
        return {n: forecast.roofline(cost, chip, n).bound for n in SLICES}

    def fits(self, program: Program) -> bool:
        """Returns whether the program compiled and fits within the limit."""
        return fits(program.cost, self.limit)


def print_plan(plan: Plan, input_rate: float | None, input_note: str, num_layers: int = 0) -> None:
    """Prints a plan.

    Args:
        plan: the plan.
        input_rate: images per second of this machine's input pipeline; None if not measured.
        input_note: the reason why it was not measured.
        num_layers: number of layers of the student's step to list, by their traffic.
    """
    console = Console(highlight=False, soft_wrap=True)
    # A wrapped table is unreadable; a terminal can scroll.
    console.width = max(console.width, 160)
    num_chips, num_hosts = len(plan.topology.devices), plan.topology.hosts
    load = plan.load
    chosen_by = f", {load.selected:,} to choose weights by" if load.selected else ""
    console.print(
        f"\n{plan.topology.name}: {num_chips} chip(s) on {num_hosts} host(s); {plan.parameters:,} "
        f"parameters; {load.labeled:,} labelled, {load.unlabeled:,} unlabelled, "
        f"{load.evaluated:,} evaluation images{chosen_by}, {load.classes} classes"
    )
    for sentence in load.assumptions:
        console.print(sentence)
    console.print(_programs_table(plan))
    if any(isinstance(p.cost, Cost) and p.cost.traffic is None for p in plan.programs):
        console.print("Memory is without the programs' code; --machine-code also makes that.")
    for sentence in _suggestion_lines(plan):
        console.print(sentence)
    if num_layers:
        console.print(_layers_table(plan, num_layers))
    if plan.schedule:
        console.print(_schedule_table(plan))
        if any(isinstance(p.cost, Counted) for p in plan.programs):
            console.print("What was not compiled is bound by its arithmetic alone in these hours.")
    if bounds := plan.bounds_by_chips():
        by_chips = ", ".join(f"{n} chips {1e3 * s:,.1f} ms" for n, s in bounds.items())
        console.print(f"The student's step with as many images a chip, at its bound: {by_chips}.")
    here = input_note if input_rate is None else f"here it supplies {input_rate:,.1f} images/s"
    if needed := plan.images_per_second:
        console.print(
            f"At its bound the student's step takes {needed / num_hosts:,.0f} images/s from each "
            f"host's input pipeline; {here}."
        )
    elif input_rate is not None:
        console.print(f"The input pipeline: {here}.")


def _programs_table(plan: Plan) -> Table:
    """Returns a table with a column per program; all but images and images/s are per chip."""
    names = [p.name.replace(" ", "\n", 1) for p in plan.programs]
    columns = [Column(name, justify="right") for name in names]
    table = Table(Column("on one chip"), *columns, box=box.SIMPLE_HEAD)
    sizes = [f"{p.images} of {p.size[1]}x{p.size[0]}" for p in plan.programs]
    table.add_row("images, on all chips", *sizes)
    if len({p.backbone for p in plan.programs}) > 1:
        table.add_row("network", *(p.backbone for p in plan.programs))
    cells_by_column = [_program_cells(plan, program) for program in plan.programs]
    for row in dict.fromkeys(name for cells in cells_by_column for name in cells):
        table.add_row(row, *(cells.get(row, "") for cells in cells_by_column))
    return table


def _program_cells(plan: Plan, program: Program) -> dict[str, str]:
    """Returns the cells of a program's column by the name of their row."""
    cost, limit = program.cost, f"{plan.limit / GIB:.1f}"
    roofline = plan.roofline(program)
    if isinstance(cost, Counted):
        assert roofline is not None  # programs are only counted for TPU topologies
        return {
            "GFLOP of products, counted": f"{cost.flops / 1e9:,.1f}",
            "floor of arithmetic, ms": f"{1e3 * roofline.arithmetic:,.2f}",
        }
    cells = {
        "memory, GiB": _format_memory(cost),
        f"fits in {limit} GiB": "yes" if plan.fits(program) else "no",
    }
    if not isinstance(cost, Cost):
        return cells
    cells["GFLOP of products, counted"] = f"{cost.flops / 1e9:,.1f}"
    if cost.compiler_flops is not None:
        cells["GFLOP, the compiler's figure"] = f"{cost.compiler_flops / 1e9:,.1f}"
    if cost.traffic is not None:
        cells["memory traffic, GB"] = f"{cost.traffic / 1e9:,.2f}"
    if cost.main_traffic is not None:
        cells["operands and results, GB"] = f"{cost.total_traffic / 1e9:,.2f}"
        cells["of these in main memory, GB"] = f"{cost.main_traffic / 1e9:,.2f}"
    for kind, (count, size) in cost.collectives.items():
        cells[f"{kind}s, MB"] = f"{size / 1e6:,.2f} in {count}"
    if roofline is None:
        return cells
    for name, seconds in dataclasses.asdict(roofline).items():
        cells[f"floor of {name}, ms"] = f"{1e3 * seconds:,.2f}"
    cells["bound, ms"] = f"{1e3 * roofline.bound:,.2f}"
    return cells | {
        "limited by": roofline.limited_by,
        "images/s, at most": f"{program.images / roofline.bound:,.0f}",
    }


def _format_memory(cost: Cost | TooLarge | Counted) -> str:
    """Formats the memory in GiB; "more" if the compiler's message did not contain the size."""
    match cost:
        case Cost():
            size = cost.memory.total
        case TooLarge():
            size = cost.needed
        case Counted():
            return "not known"
    return f"{size / GIB:.2f}" if size else "more"


def _layers_table(plan: Plan, count: int) -> Table:
    """Returns the layers of the student's step with the most traffic.

    An operand that is read in part counts as a whole.
    """
    right = [Column(name, justify="right") for name in ("GB", "of these in main memory")]
    table = Table(Column("student step: layer"), *right, box=box.SIMPLE_HEAD)
    cost = plan.student_step.cost
    for layer, sizes in list(cost.by_layer.items())[:count] if isinstance(cost, Cost) else ():
        table.add_row(layer, *(f"{size / 1e9:,.3f}" for size in sizes))
    return table


def _schedule_table(plan: Plan) -> Table:
    right = [Column(name, justify="right") for name in ("hours", "chip-hours")]
    table = Table(Column("the run, at least"), *right, box=box.SIMPLE_HEAD)
    num_chips = len(plan.topology.devices)
    rows = [(item.name, item.seconds / 3600) for item in plan.schedule]
    for name, hours in (*rows, ("all", plan.hours)):
        table.add_row(name, f"{hours:.2f}", f"{hours * num_chips:.1f}")
    return table


def _suggestion_lines(plan: Plan) -> list[str]:
    """Returns a line for each change that was tried, and one that names the smallest that fits."""
    lines = []
    for name, suggestions in plan.suggestions.items():
        for suggestion in suggestions:
            lines.append(
                f"{name} with {suggestion}: {_format_memory(suggestion.program.cost)} GiB, "
                f"{'fits' if suggestion.fits else 'does not fit'}"
            )
        smallest = next((suggestion for suggestion in suggestions if suggestion.fits), None)
        lines.append(
            f"{name} does not fit; the smallest change that makes it fit: {smallest}"
            if smallest
            else f"{name} does not fit, with none of these changes: take more or larger chips."
        )
    changed_keys = {key for tried in plan.suggestions.values() for s in tried for key in s.change}
    if "train.accumulate" in changed_keys:
        lines.append(
            "train.accumulate changes neither batch nor loss nor update, but batch norm computes "
            "its moments from each micro-batch."
        )
    return lines


def to_json(plan: Plan, input_rate: float | None) -> dict[str, Any]:
    """Returns the plan as a JSON object, in bytes, operations and seconds.

    Costs are per chip; images and the schedule are those of the whole topology.
    """
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
            "assumed": list(plan.load.assumptions),
        },
        "programs": [_program_to_json(plan, program) for program in plan.programs],
        "remedies": {
            name: [
                {"change": s.change, "fits": s.fits, **_program_to_json(plan, s.program)}
                for s in suggestions
            ]
            for name, suggestions in plan.suggestions.items()
        },
        "schedule": [dataclasses.asdict(item) for item in plan.schedule],
        "hours": plan.hours if plan.schedule else None,
        "student_step_seconds_by_chips": plan.bounds_by_chips(),
        "images_per_second": plan.images_per_second,
        "input_images_per_second_here": input_rate,
    }


def _program_to_json(plan: Plan, program: Program) -> dict[str, Any]:
    roofline = plan.roofline(program)
    floors = dataclasses.asdict(roofline) | {"bound": roofline.bound} if roofline else None
    # The memory of a program that was only counted is unknown.
    fits = None if isinstance(program.cost, Counted) else plan.fits(program)
    return dataclasses.asdict(program) | {"name": program.name, "fits": fits, "floors": floors}
