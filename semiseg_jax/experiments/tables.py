"""Builds the paper's tables and figures from result rows: Markdown, CSV and a plot.

mIoU is in percent, as mean and standard deviation (n - 1) over seeds. Gains and steps are paired by
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

from semiseg_jax.eval_protocol import COMPARED, EVALUATION, EvalProtocol
from semiseg_jax.experiments.paper_tables import Row, Setting, Table, published_miou
from semiseg_jax.reporting.plots import COLOURS
from semiseg_jax.results import ResultRow
from semiseg_jax.runtime.fileio import write_bytes
from semiseg_jax.runtime.plain_matplotlib import default_style, figure


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """The results of a run with one seed.

    Attributes:
        run: key of `paper_tables.RUNS`.
        seed: its seed.
        results: content of results.json.
        data: content of data.json.
    """

    run: str
    seed: int
    results: Mapping[str, Sequence[ResultRow]]
    data: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A table row with its results, over the seeds that share an evaluation protocol.

    Attributes:
        label: printed label.
        row: definition of the row.
        round: round of the stage.
        results: rows of results.json, by seed.
        control: percent of the control of the same length, by seed; empty if there is none.
        previous: percent of the row that this one adds a component to, by seed; empty if there is
            none.
        curve: (step, percent) of the evaluations inside the stage and at its end, by seed.
        labeled: number of labelled images.
        unlabeled: number of unlabelled images.
    """

    label: str
    row: Row
    round: int
    results: dict[int, ResultRow]
    control: dict[int, float]
    previous: dict[int, float]
    curve: dict[int, list[tuple[int, float]]]
    labeled: int
    unlabeled: int

    @property
    def images(self) -> str:
        """The numbers of training images: such as "12 + 355", or "12" unless it is a student."""
        unlabeled = f" + {self.unlabeled}" if self.row.stage == "student" else ""
        return f"{self.labeled}{unlabeled}"

    @property
    def protocol(self) -> EvalProtocol:
        """The protocol of the first seed; the compared keys are equal for all seeds."""
        return self.results[min(self.results)].protocol

    @property
    def miou(self) -> dict[int, float]:
        """Percent, by seed."""
        return {seed: result.miou_percent for seed, result in self.results.items()}

    @property
    def mean(self) -> str:
        """Mean and standard deviation, such as "38.40 ± 0.31"."""
        values = list(self.miou.values())
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{spread}"

    @property
    def gain(self) -> str:
        """Gain over the control with the standard error of its mean, such as "+1.72 ± 0.20".

        The number of pairs follows, as "(2 of 3)", if not every seed has a control.
        """
        return _paired_difference(self.miou, self.control)

    @property
    def step(self) -> str:
        """Difference to the row that this one adds a component to, in the format of `gain`."""
        return _paired_difference(self.miou, self.previous)


@dataclasses.dataclass(frozen=True)
class TableMeta:
    """What a table's rows have in common.

    Attributes:
        table: key of `paper_tables.TABLES`.
        network: head and backbone, such as "v3plus xception65".
    """

    table: str
    network: str


def _paired_difference(values: Mapping[int, float], others: Mapping[int, float]) -> str:
    pairs = [values[seed] - others[seed] for seed in values if seed in others]
    if not pairs:
        return ""
    error = f" ± {np.std(pairs, ddof=1) / math.sqrt(len(pairs)):.2f}" if len(pairs) > 1 else ""
    count = f" ({len(pairs)} of {len(values)})" if len(pairs) < len(values) else ""
    return f"{np.mean(pairs):+z.2f}{error}{count}"


def build_rows(table: Table, trials: Sequence[TrialResult], students: int) -> list[TableRow]:
    """Returns the rows of a table that have a result; a row for "each" round becomes several.

    Seeds whose results have different protocols make a row for each protocol.

    Args:
        table: a value of `paper_tables.TABLES`.
        trials: results of its runs.
        students: number of students of the whole method: the round of rows of the "last" one.
    """
    rows = []
    for row in visible_rows(table, students):
        rounds = {"first": [1], "last": [students], "each": range(1, students + 1)}[row.round]
        for round_ in [0] if row.stage == "teacher" else rounds:
            number = f" {round_}" if row.round == "each" else ""
            rows += _rows_by_protocol(row.title(students) + number, row, round_, trials)
    return rows


def visible_rows(table: Table, students: int) -> list[Row]:
    """Returns a table's rows without those of the last round that repeat one of the first."""
    firsts = {(row.run, row.stage) for row in table.rows if row.round == "first"}
    return [
        row
        for row in table.rows
        if not (row.round == "last" and students == 1 and (row.run, row.stage) in firsts)
    ]


def _rows_by_protocol(
    label: str, row: Row, round_: int, trials: Sequence[TrialResult]
) -> list[TableRow]:
    by_seed = {trial.seed: trial for trial in trials if trial.run == row.run}
    remaining = {
        seed: result
        for seed, trial in by_seed.items()
        if (result := _stage_result(trial, row.stage, round_)) is not None
    }
    rows = []
    while remaining:
        protocol = remaining[min(remaining)].protocol
        results = {s: r for s, r in remaining.items() if r.protocol.is_comparable(protocol)}
        remaining = {seed: r for seed, r in remaining.items() if seed not in results}
        data = by_seed[min(results)].data
        control, previous = {}, {}
        if row.stage == "student":
            control = _control_by_seed(row.run, round_, trials, protocol, data["labeled"])
        if row.adds_to:
            previous = _miou_by_seed(row.adds_to, "student", 1, trials, protocol, COMPARED)
        rows.append(
            TableRow(
                label,
                row,
                round_,
                dict(sorted(results.items())),
                control,
                previous,
                {seed: _curve(by_seed[seed], row.stage, round_) for seed in results},
                data["labeled"],
                data["unlabeled"],
            )
        )
    return rows


def _stage_result(trial: TrialResult, stage: str, round_: int) -> ResultRow | None:
    """Returns the result row of a stage's end; None if there is none."""
    rows = trial.results["rows"]
    return next((row for row in rows if row.stage_key == (stage, round_)), None)


def _miou_by_seed(
    run: str,
    stage: str,
    round_: int,
    trials: Sequence[TrialResult],
    protocol: EvalProtocol,
    keys: Sequence[str],
) -> dict[int, float]:
    """Returns the percent of a run's stage by seed, where these keys of the protocol are equal."""
    results = {t.seed: _stage_result(t, stage, round_) for t in trials if t.run == run}
    return {
        seed: result.miou_percent
        for seed, result in results.items()
        if result is not None and result.protocol.is_comparable(protocol, keys)
    }


def _control_by_seed(
    run: str,
    round_: int,
    trials: Sequence[TrialResult],
    protocol: EvalProtocol,
    labeled: int,
) -> dict[int, float]:
    """Returns the percent, by seed, of a control with as many steps and labelled images.

    It is the run's own control if it has one.
    """
    same_labels = [trial for trial in trials if trial.data["labeled"] == labeled]
    for name in (run, *dict.fromkeys(trial.run for trial in same_labels)):
        control = _miou_by_seed(name, "control", round_, same_labels, protocol, EVALUATION)
        if control:
            return control
    return {}


def _curve(trial: TrialResult, stage: str, round_: int) -> list[tuple[int, float]]:
    """Returns (step, percent) of every evaluation of a stage, by step."""
    rows = [*trial.results["curve"], *trial.results["rows"]]
    results = [row for row in rows if row.stage_key == (stage, round_)]
    return sorted((row.step, row.miou_percent) for row in results)


def write_table(
    workdir: epath.Path, table: Table, rows: Sequence[TableRow], meta: TableMeta
) -> str:
    """Writes NAME.md, NAME.csv and NAME.png of at least one row into a folder.

    Returns:
        The Markdown.
    """
    name = meta.table if meta.table[0].isalpha() else f"table_{meta.table}"
    text = to_markdown(table, rows, meta)
    write_bytes(workdir / f"{name}.md", text.encode())
    write_bytes(workdir / f"{name}.csv", to_csv(table, rows, meta).encode())
    write_bytes(workdir / f"{name}.png", plot_png(table, rows))
    return text


def group_by_protocol(table: Table, rows: Sequence[TableRow]) -> list[list[TableRow]]:
    """Groups the rows whose results may be compared."""
    keys = EVALUATION if table.images_vary else COMPARED
    groups = []
    remaining = list(rows)
    while remaining:
        protocol = remaining[0].protocol
        groups.append([row for row in remaining if row.protocol.is_comparable(protocol, keys)])
        remaining = [row for row in remaining if row not in groups[-1]]
    return groups


def to_markdown(table: Table, rows: Sequence[TableRow], meta: TableMeta) -> str:
    """Returns a Markdown table for every protocol."""
    sections = [_section(table, group, meta) for group in group_by_protocol(table, rows)]
    return "\n".join([f"## {table.title}\n", *sections])


def _section(table: Table, rows: Sequence[TableRow], meta: TableMeta) -> str:
    """Returns the Markdown of rows with one protocol: a caption and a table."""
    labeled, unlabeled = rows[0].labeled, rows[0].unlabeled
    published = [_published(table, row, meta) for row in rows]
    columns = {
        "labelled + unlabelled": [row.images if table.images_vary else "" for row in rows],
        "mIoU": [row.mean for row in rows],
        "gain": [row.gain for row in rows],
        "step": [row.step for row in rows],
        "paper": ["" if p is None else f"{p[1]:.1f}" for p in published],
        "seeds": [", ".join(map(str, row.results)) for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    explanations = {
        "gain": "gain over the control of the same length",
        "step": "step over the row that this one adds to",
    }
    differences = ", ".join(text for name, text in explanations.items() if name in columns)
    settings = " and ".join(dict.fromkeys(str(p[0]) for p in published if p is not None))
    protocol = rows[0].protocol
    caption = (
        f"{protocol.data}: "
        f"{'' if table.images_vary else f'{labeled} labelled and {unlabeled} unlabelled images; '}"
        f"{protocol.split}, scales {list(protocol.scales)}, "
        f"{'mirrored too' if protocol.flip else 'not mirrored'}, {protocol.selection} "
        "checkpoint; mIoU in %, mean ± standard deviation"
    )
    if differences:
        caption += f"; {differences}, ± standard error, paired by seed"
    if settings:
        caption += f"; paper: the paper's mIoU on {settings}"
    lines = [
        f"{caption}.\n",
        "| " + "".join(f"| {name} " for name in columns) + "|",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row, *cells in zip(rows, *columns.values(), strict=True):
        lines.append(f"| {row.label} " + "".join(f"| {cell} " for cell in cells) + "|")
    return "\n".join(lines) + "\n"


def _published(table: Table, row: TableRow, meta: TableMeta) -> tuple[Setting, float] | None:
    """Returns the paper's setting and percent to print beside a row."""
    return published_miou(table, row.row, row.protocol.data, meta.network, row.labeled)


def to_csv(table: Table, rows: Sequence[TableRow], meta: TableMeta) -> str:
    """Returns a CSV line for every seed, and in a figure over steps for every evaluation.

    mIoU, that of the control and that of the paper are in percent.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("table", "label", "run", "stage", "round", "labeled", "unlabeled")
    writer.writerow((*names, "seed", "step", "miou", "control", "paper", "protocol"))
    for row in rows:
        identity = (meta.table, row.label, row.row.run, row.row.stage, row.round)
        images = (row.labeled, row.unlabeled)
        published = _published(table, row, meta)
        paper = "" if published is None else published[1]
        for seed, result in row.results.items():
            end = [(result.step, result.miou_percent)]
            protocol = json.dumps(result.protocol.to_json(), sort_keys=True)
            for step, miou in row.curve[seed] if table.x == "step" else end:
                control = row.control.get(seed, "")
                writer.writerow((*identity, *images, seed, step, miou, control, paper, protocol))
    return text.getvalue()


@default_style()
def plot_png(table: Table, rows: Sequence[TableRow]) -> bytes:
    """Returns a PNG with a panel for every protocol."""
    panels = group_by_protocol(table, rows)
    heights = [1.2 + 0.4 * max(len(panel), 5 if table.x != "row" else 1) for panel in panels]
    drawn = figure.Figure(figsize=(7, sum(heights)), layout="constrained")
    drawn.suptitle(table.title, fontsize=10)
    all_axes = drawn.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    plot = {"row": _plot_rows, "step": _plot_curves, "round": _plot_rounds, "ratio": _plot_ratios}
    for axes, panel in zip(all_axes, panels, strict=True):
        plot[table.x](axes, panel)
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()


def _plot_rows(axes: Any, rows: Sequence[TableRow]) -> None:
    """Plots a dot for each seed of a row and a stroke for their mean."""
    for y, row in enumerate(rows):
        values = list(row.miou.values())
        axes.plot(values, [y] * len(values), "o", color=COLOURS[0], alpha=0.6)
        axes.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color=COLOURS[1], linewidth=2)
    labels = [f"{row.label}\n{row.images} images" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("mIoU, %")
    axes.grid(axis="x", alpha=0.3)


def _plot_curves(axes: Any, rows: Sequence[TableRow]) -> None:
    """Plots mIoU over training steps."""
    for number, row in enumerate(rows):
        _plot_seeds(axes, row.curve, COLOURS[number % len(COLOURS)], row.label)
    _label_axes(axes, "step")


def _plot_rounds(axes: Any, rows: Sequence[TableRow]) -> None:
    """Plots mIoU by round, of students and of controls, both from the teacher as round 0."""
    students = [row for row in rows if row.row.stage != "control"]
    controls = [row for row in rows if row.row.stage != "student"]
    _plot_seeds(axes, _points_by_seed(students, lambda row: row.round), COLOURS[0], "students")
    label = "control: labels alone, as long"
    _plot_seeds(axes, _points_by_seed(controls, lambda row: row.round), COLOURS[1], label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _label_axes(axes, "round (0: the teacher)")


def _plot_ratios(axes: Any, rows: Sequence[TableRow]) -> None:
    """Plots the students' mIoU over the ratio of unlabelled images, other rows as level lines."""
    students = [row for row in rows if row.row.stage == "student"]
    points = _points_by_seed(students, lambda row: row.unlabeled / row.labeled)
    _plot_seeds(axes, points, COLOURS[0], "student")
    for number, row in enumerate(row for row in rows if row.row.stage != "student"):
        mean = np.mean(list(row.miou.values()))
        axes.axhline(mean, color=COLOURS[1 + number], linestyle="--", label=row.label)
    _label_axes(axes, "unlabelled images for each labelled one")


def _points_by_seed(
    rows: Sequence[TableRow], x: Callable[[TableRow], float]
) -> dict[int, list[tuple[float, float]]]:
    """Returns (x, percent) of the rows by seed, in the order of x."""
    points: dict[int, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=x):
        for seed, miou in row.miou.items():
            points.setdefault(seed, []).append((x(row), miou))
    return points


def _plot_seeds(
    axes: Any, points: Mapping[int, Sequence[tuple[float, float]]], colour: str, label: str
) -> None:
    """Plots (x, percent) of every seed thin, and their mean thick at each x that all seeds have."""
    if not points:
        return
    for curve in points.values():
        axes.plot(*zip(*curve, strict=True), ".-", color=colour, alpha=0.35, linewidth=1)
    shared = sorted(set.intersection(*({x for x, _ in curve} for curve in points.values())))
    means = [np.mean([dict(curve)[x] for curve in points.values()]) for x in shared]
    axes.plot(shared, means, "o-", color=colour, linewidth=2, markersize=4, label=label)


def _label_axes(axes: Any, x: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel("mIoU, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
