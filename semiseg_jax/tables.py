"""The paper's tables and figures from result rows: Markdown, CSV and a picture.

mIoU in percent, mean and standard deviation (n - 1) over the seeds; gains and steps are paired by
seed, with the standard error of their mean.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib import figure

from semiseg_jax.data.labels import write_bytes
from semiseg_jax.evaluate import COMPARED, EVALUATION, comparable
from semiseg_jax.paper import Row, Table, published

# Colours that colour-blind eyes tell apart: Okabe and Ito's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclasses.dataclass(frozen=True)
class Source:
    """A run of one seed: its name in `paper.RUNS`, and its results.json and data.json."""

    run: str
    seed: int
    results: Mapping[str, Any]
    data: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a table: the result of one row, over the seeds that have it by one protocol.

    Attributes:
        label: for people.
        row: what it reports.
        round: of the stage.
        found: rows of results.json, by seed.
        control: percent, by seed, of labels alone trained as long; empty where there is none.
        below: percent, by seed, of the row that this one is a step over; empty where there is none.
        curve: (step, percent) inside the stage and at its end, by seed.
        labeled, unlabeled: images.
    """

    label: str
    row: Row
    round: int
    found: dict[int, dict[str, Any]]
    control: dict[int, float]
    below: dict[int, float]
    curve: dict[int, list[tuple[int, float]]]
    labeled: int
    unlabeled: int

    @property
    def images(self) -> str:
        """Those that it trains on: such as "12 + 355", or "12" where no student is among it."""
        unlabeled = f" + {self.unlabeled}" if self.row.stage == "student" else ""
        return f"{self.labeled}{unlabeled}"

    @property
    def protocol(self) -> dict[str, Any]:
        """Of the first seed; what else is compared is that of all."""
        return self.found[min(self.found)]["protocol"]

    @property
    def miou(self) -> dict[int, float]:
        """Percent, by seed."""
        return {seed: _percent(row) for seed, row in self.found.items()}

    @property
    def mean(self) -> str:
        """Such as "38.40 ± 0.31"."""
        values = list(self.miou.values())
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{spread}"

    @property
    def gain(self) -> str:
        """Over the control, such as "+1.72 ± 0.20", the standard error of the mean of pairs.

        With the count of pairs, as "(2 of 3)", where not every seed has a control.
        """
        return _difference(self.miou, self.control)

    @property
    def step(self) -> str:
        """Over the row that this one adds to, in the same form."""
        return _difference(self.miou, self.below)


def _percent(row: Mapping[str, Any]) -> float:
    return 100 * row["miou"]


def _difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not pairs:
        return ""
    error = f" ± {np.std(pairs, ddof=1) / math.sqrt(len(pairs)):.2f}" if len(pairs) > 1 else ""
    count = f" ({len(pairs)} of {len(ours)})" if len(pairs) < len(ours) else ""
    return f"{np.mean(pairs):+z.2f}{error}{count}"


@dataclasses.dataclass(frozen=True)
class About:
    """What a table is of: its name in `paper.TABLES`, and the network's head and backbone."""

    table: str
    network: str


def lines(table: Table, sources: Sequence[Source], students: int) -> list[Line]:
    """The lines of a table that have a result; those of `each` once for every round.

    Seeds whose results are of different protocols make a line for each protocol.

    Args:
        table: of `paper.TABLES`.
        sources: its runs.
        students: of the whole method, which is the round of rows of the last one.
    """
    made = []
    for row in shown(table, students):
        rounds = {"first": [1], "last": [students], "each": range(1, students + 1)}[row.round]
        for round_ in [0] if row.stage == "teacher" else rounds:
            number = f" {round_}" if row.round == "each" else ""
            label = row.title(students) + number
            made += _lines(label, row, round_, sources)
    return made


def shown(table: Table, students: int) -> list[Row]:
    """Its rows without those of the last student where that is the first, which has one."""
    firsts = {(row.run, row.stage) for row in table.rows if row.round == "first"}
    return [
        row
        for row in table.rows
        if not (row.round == "last" and students == 1 and (row.run, row.stage) in firsts)
    ]


def _lines(label: str, row: Row, round_: int, sources: Sequence[Source]) -> list[Line]:
    """A row's lines, one for each protocol."""
    mine = {s.seed: s for s in sources if s.run == row.run}
    rest = {seed: r for seed, s in mine.items() if (r := _row(s, row.stage, round_)) is not None}
    made = []
    while rest:
        protocol = rest[min(rest)]["protocol"]
        found = {seed: r for seed, r in rest.items() if comparable(r["protocol"], protocol)}
        rest = {seed: r for seed, r in rest.items() if seed not in found}
        like = mine[min(found)].data
        student = row.stage == "student"
        made.append(
            Line(
                label,
                row,
                round_,
                dict(sorted(found.items())),
                _control(row, round_, sources, found, like) if student else {},
                _results(row.over, "student", 1, sources, protocol, COMPARED) if row.over else {},
                {seed: _curve(mine[seed], row.stage, round_) for seed in found},
                like["labeled"],
                like["unlabeled"],
            )
        )
    return made


def _row(source: Source, stage: str, round_: int) -> Any:
    """The result of a stage's end; None where there is none."""
    rows = source.results["rows"]
    return next((r for r in rows if (r["stage"], r["round"]) == (stage, round_)), None)


def _results(
    run: str,
    stage: str,
    round_: int,
    sources: Sequence[Source],
    protocol: Mapping[str, Any],
    keys: Sequence[str],
) -> dict[int, float]:
    """Percent, by seed, of a run's stage, where it has the same values of a protocol's keys."""
    rows = {s.seed: _row(s, stage, round_) for s in sources if s.run == run}
    return {
        seed: _percent(row)
        for seed, row in rows.items()
        if row is not None and comparable(row["protocol"], protocol, keys)
    }


def _control(
    row: Row,
    round_: int,
    sources: Sequence[Source],
    found: Mapping[int, Mapping[str, Any]],
    like: Mapping[str, Any],
) -> dict[int, float]:
    """Percent, by seed, of the control of as many steps and the same labels."""
    labels = [s for s in sources if s.data["labeled"] == like["labeled"]]
    protocol = found[min(found)]["protocol"]
    for run in (row.run, *dict.fromkeys(s.run for s in labels)):
        if control := _results(run, "control", round_, labels, protocol, EVALUATION):
            return control
    return {}


def _curve(source: Source, stage: str, round_: int) -> list[tuple[int, float]]:
    rows = [*source.results["curve"], *source.results["rows"]]
    mine = [r for r in rows if (r["stage"], r["round"]) == (stage, round_)]
    return sorted((r["step"], _percent(r)) for r in mine)


def write(workdir: epath.Path, table: Table, found: Sequence[Line], about: About) -> str:
    """Writes NAME.md, NAME.csv and NAME.png of at least one line into a folder; the Markdown."""
    name = about.table if about.table[0].isalpha() else f"table_{about.table}"
    text = markdown(table, found, about)
    write_bytes(workdir / f"{name}.md", text.encode())
    write_bytes(workdir / f"{name}.csv", as_csv(table, found, about).encode())
    write_bytes(workdir / f"{name}.png", picture(table, found))
    return text


def groups(table: Table, found: Sequence[Line]) -> list[list[Line]]:
    """Lines that may stand together: results of different protocols are not to be compared."""
    keys = EVALUATION if table.images_vary else COMPARED
    made = []
    rest = list(found)
    while rest:
        same = [line for line in rest if comparable(line.protocol, rest[0].protocol, keys)]
        rest = [line for line in rest if line not in same]
        made.append(same)
    return made


def markdown(table: Table, found: Sequence[Line], about: About) -> str:
    """A table for every protocol."""
    sections = [_section(table, group, about) for group in groups(table, found)]
    return "\n".join([f"## {table.title}\n", *sections])


def _section(table: Table, found: Sequence[Line], about: About) -> str:
    columns = _columns(table, found, about)
    explained = {
        "gain": "gain over the control of the same length",
        "step": "step over the row that this one adds to",
    }
    differences = ", ".join(what for name, what in explained.items() if name in columns)
    protocol = found[0].protocol
    images = f"{found[0].labeled} labelled and {found[0].unlabeled} unlabelled images; "
    rows = [
        f"{protocol['data']}: {'' if table.images_vary else images}"
        f"{protocol['split']}, scales {protocol['scales']}, "
        f"{'mirrored too' if protocol['flip'] else 'not mirrored'}, {protocol['selection']} "
        "checkpoint; mIoU in %, mean ± standard deviation"
        f"{f'; {differences}, ± standard error, paired by seed' if differences else ''}.\n",
        "| " + "".join(f"| {name} " for name in columns) + "|",
        "|---" * (len(columns) + 1) + "|",
    ]
    for line, *cells in zip(found, *columns.values(), strict=True):
        rows.append(f"| {line.label} " + "".join(f"| {cell} " for cell in cells) + "|")
    return "\n".join(rows) + "\n"


def _columns(table: Table, found: Sequence[Line], about: About) -> dict[str, list[str]]:
    """The cells by heading, one for each line; no gains or steps where no line has one."""
    first = found[0]
    setting, theirs = published(first.protocol["data"], about.network, first.labeled)
    paper = [theirs.get(line.row.paper) for line in found]
    images = [line.images for line in found]
    made = {
        "labelled + unlabelled": images if table.images_vary else [],
        "mIoU": [line.mean for line in found],
        "gain": [line.gain for line in found],
        "step": [line.step for line in found],
        "seeds": [", ".join(map(str, line.found)) for line in found],
        f"the paper's ({setting})": ["" if n is None else f"{n:.1f}" for n in paper],
    }
    empty = [name for name in ("labelled + unlabelled", "gain", "step") if not any(made[name])]
    return {name: cells for name, cells in made.items() if name not in empty}


def as_csv(table: Table, found: Sequence[Line], about: About) -> str:
    """A line for every seed, and for a figure over steps every evaluation; mIoU in percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("table", "label", "run", "stage", "round", "labeled", "unlabeled")
    writer.writerow((*names, "seed", "step", "miou", "control", "paper", "protocol"))
    for line in found:
        what = (about.table, line.label, line.row.run, line.row.stage, line.round)
        images = (line.labeled, line.unlabeled)
        _, theirs = published(line.protocol["data"], about.network, line.labeled)
        for seed, row in line.found.items():
            whole = [(row["step"], _percent(row))]
            protocol = json.dumps(row["protocol"], sort_keys=True)
            for step, miou in line.curve[seed] if table.x == "step" else whole:
                control = line.control.get(seed, "")
                paper = theirs.get(line.row.paper, "")
                writer.writerow((*what, *images, seed, step, miou, control, paper, protocol))
    return text.getvalue()


def picture(table: Table, found: Sequence[Line]) -> bytes:
    """A PNG, with a panel for every protocol."""
    panels = groups(table, found)
    heights = [1.2 + 0.4 * max(len(panel), 5 if table.x != "row" else 1) for panel in panels]
    drawn = figure.Figure(figsize=(7, sum(heights)), layout="constrained")
    drawn.suptitle(table.title, fontsize=10)
    axes = drawn.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    draw = {"row": _draw_rows, "step": _draw_curves, "round": _draw_rounds, "ratio": _draw_ratios}
    for place, panel in zip(axes, panels, strict=True):
        draw[table.x](place, panel)
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()


def _draw_rows(axes: Any, found: Sequence[Line]) -> None:
    """A dot for each seed and a stroke for their mean."""
    for place, line in enumerate(found):
        values = list(line.miou.values())
        axes.plot(values, [place] * len(values), "o", color=COLOURS[0], alpha=0.6)
        axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=COLOURS[1], linewidth=2)
    labels = [f"{line.label}\n{line.images} images" for line in found]
    axes.set_yticks(range(len(found)), labels, fontsize=7)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("mIoU, %")
    axes.grid(axis="x", alpha=0.3)


def _draw_curves(axes: Any, found: Sequence[Line]) -> None:
    """mIoU over training, of each seed thin, their mean thick."""
    for number, line in enumerate(found):
        _draw_seeds(axes, line.curve, COLOURS[number % len(COLOURS)], line.label)
    _finish(axes, "step")


def _draw_rounds(axes: Any, found: Sequence[Line]) -> None:
    """mIoU by round, from the teacher as round 0; the controls beside the students."""
    method = [line for line in found if line.row.stage != "control"]
    controls = [line for line in found if line.row.stage != "student"]
    _draw_seeds(axes, _over(method, lambda line: line.round), COLOURS[0], "students")
    label = "control: labels alone, as long"
    _draw_seeds(axes, _over(controls, lambda line: line.round), COLOURS[1], label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes, "round (0: the teacher)")


def _draw_ratios(axes: Any, found: Sequence[Line]) -> None:
    """mIoU over the count of unlabelled images; what has labels alone as level lines."""
    students = [line for line in found if line.row.stage == "student"]
    points = _over(students, lambda line: line.unlabeled / line.labeled)
    _draw_seeds(axes, points, COLOURS[0], "student")
    for number, line in enumerate(line for line in found if line.row.stage != "student"):
        mean = np.mean(list(line.miou.values()))
        axes.axhline(mean, color=COLOURS[1 + number], linestyle="--", label=line.label)
    _finish(axes, "unlabelled images for each labelled one")


def _over(
    found: Sequence[Line], place: Callable[[Line], float]
) -> dict[int, list[tuple[float, float]]]:
    """(place, percent) of lines, by seed, in the order of places."""
    points: dict[int, list[tuple[float, float]]] = {}
    for line in sorted(found, key=place):
        for seed, miou in line.miou.items():
            points.setdefault(seed, []).append((place(line), miou))
    return points


def _draw_seeds(
    axes: Any, points: Mapping[int, Sequence[tuple[float, float]]], colour: str, label: str
) -> None:
    """(x, percent) of every seed thin, and thick their mean where all have one."""
    if not points:
        return
    for curve in points.values():
        axes.plot(*zip(*curve, strict=True), ".-", color=colour, alpha=0.35, linewidth=1)
    places = sorted(set.intersection(*({x for x, _ in curve} for curve in points.values())))
    means = [np.mean([dict(curve)[x] for curve in points.values()]) for x in places]
    axes.plot(places, means, "o-", color=colour, linewidth=2, markersize=4, label=label)


def _finish(axes: Any, x: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel("mIoU, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
