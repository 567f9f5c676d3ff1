"""The paper's tables and figures from result rows: Markdown, CSV and a picture.

mIoU in percent, mean and standard deviation (n - 1) over the seeds; a gain is paired by seed, with
the standard error of its mean.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib import figure

from semiseg_jax.data.labels import write_bytes
from semiseg_jax.evaluate import comparable
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
    """A line of a table.

    Attributes:
        label: for people.
        row: what it reports.
        round: of the stage.
        miou: percent, by seed.
        control: percent, by seed, of labels alone trained as long; empty where there is none.
        curve: (step, percent) inside the stage, by seed.
        labeled, unlabeled: images.
        protocol: of the evaluation.
    """

    label: str
    row: Row
    round: int
    miou: dict[int, float]
    control: dict[int, float]
    curve: dict[int, list[tuple[int, float]]]
    labeled: int
    unlabeled: int
    protocol: dict[str, Any]

    @property
    def mean(self) -> str:
        """Such as "38.4 ± 0.3"."""
        values = list(self.miou.values())
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{spread}"

    @property
    def gain(self) -> str:
        """Over the control, such as "+1.7 ± 0.2", the standard error of the mean of pairs."""
        pairs = [self.miou[seed] - self.control[seed] for seed in self.miou if seed in self.control]
        if not pairs:
            return ""
        error = f" ± {np.std(pairs, ddof=1) / math.sqrt(len(pairs)):.2f}" if len(pairs) > 1 else ""
        return f"{np.mean(pairs):+z.2f}{error}"


@dataclasses.dataclass(frozen=True)
class About:
    """What a table is of: its name in `paper.TABLES`, the data, the network's backbone."""

    table: str
    data: str
    backbone: str


def lines(table: Table, sources: Sequence[Source], students: int) -> list[Line]:
    """The lines of a table that have a result; those of `each` once for every round.

    Args:
        table: of `paper.TABLES`.
        sources: its runs.
        students: of the whole method, which is the round of rows of the last one.
    """
    found = []
    for row in table.rows:
        rounds = {"first": [1], "last": [students], "each": range(1, students + 1)}[row.round]
        for round_ in [0] if row.stage == "teacher" else rounds:
            label = f"{row.label} {round_}" if row.round == "each" else row.label
            if line := _line(label, row, round_, sources):
                found.append(line)
    return found


def _line(label: str, row: Row, round_: int, sources: Sequence[Source]) -> Line | None:
    mine = {s.seed: s for s in sources if s.run == row.run}
    rows = {seed: _row(s, row.stage, round_) for seed, s in mine.items()}
    done = {seed: r for seed, r in rows.items() if r is not None}
    if not done:
        return None
    control = {
        s.seed: 100 * r["miou"]
        for s in sources
        if row.stage == "student" and (r := _row(s, "control", round_)) is not None
    }
    first = min(done)
    return Line(
        label,
        row,
        round_,
        {seed: 100 * r["miou"] for seed, r in done.items()},
        control,
        {seed: _curve(mine[seed], row.stage, round_) for seed in done},
        mine[first].data["labeled"],
        mine[first].data["unlabeled"],
        done[first]["protocol"],
    )


def _row(source: Source, stage: str, round_: int) -> Any:
    """The result of a stage's end; None where there is none."""
    rows = source.results["rows"]
    return next((r for r in rows if (r["stage"], r["round"]) == (stage, round_)), None)


def _curve(source: Source, stage: str, round_: int) -> list[tuple[int, float]]:
    rows = [*source.results["curve"], *source.results["rows"]]
    mine = [r for r in rows if (r["stage"], r["round"]) == (stage, round_)]
    return sorted((r["step"], 100 * r["miou"]) for r in mine)


def write(workdir: epath.Path, table: Table, found: Sequence[Line], about: About) -> str:
    """Writes NAME.md, NAME.csv and NAME.png into a folder; the Markdown."""
    name = about.table if about.table[0].isalpha() else f"table_{about.table}"
    text = markdown(table, found, about)
    write_bytes(workdir / f"{name}.md", text.encode())
    write_bytes(workdir / f"{name}.csv", as_csv(found, about).encode())
    if found:
        write_bytes(workdir / f"{name}.png", picture(table, found))
    return text


def markdown(table: Table, found: Sequence[Line], about: About) -> str:
    """A table for every protocol, because results of different ones are not to be compared."""
    texts = [f"## {table.title}\n"]
    rest = list(found)
    while rest:
        same = [line for line in rest if comparable(line.protocol, rest[0].protocol)]
        rest = [line for line in rest if line not in same]
        texts.append(_section(same, about))
    if not found:
        texts.append("No run has a result yet.\n")
    return "\n".join(texts)


def _section(found: Sequence[Line], about: About) -> str:
    first = found[0]
    setting, _ = published("", about.data, about.backbone, first.labeled)
    protocol = first.protocol
    rows = [
        f"{about.data}: {first.labeled} labelled and {first.unlabeled} unlabelled images; "
        f"{protocol['split']}, scales {protocol['scales']}, "
        f"{'mirrored too' if protocol['flip'] else 'not mirrored'}, {protocol['selection']} "
        f"checkpoint; mIoU in %, mean ± standard deviation; gain over the control of the same "
        "length ± standard error, paired by seed.\n",
        f"| | mIoU | gain | seeds | the paper's ({setting}) |",
        "|---|---|---|---|---|",
    ]
    for line in found:
        number = published(line.row.paper, about.data, about.backbone, line.labeled)[1]
        seeds = ", ".join(map(str, sorted(line.miou)))
        theirs = "" if number is None else f"{number:.1f}"
        rows.append(f"| {line.label} | {line.mean} | {line.gain} | {seeds} | {theirs} |")
    return "\n".join(rows) + "\n"


def as_csv(found: Sequence[Line], about: About) -> str:
    """A line for every seed; mIoU in percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("table", "label", "run", "stage", "round", "labeled", "unlabeled")
    writer.writerow((*names, "seed", "miou", "control", "protocol"))
    for line in found:
        what = (about.table, line.label, line.row.run, line.row.stage, line.round)
        for seed, miou in sorted(line.miou.items()):
            control = line.control.get(seed, "")
            writer.writerow(
                (*what, line.labeled, line.unlabeled, seed, miou, control, _plain(line.protocol))
            )
    return text.getvalue()


def _plain(protocol: Mapping[str, Any]) -> str:
    return json.dumps(protocol, sort_keys=True)


def picture(table: Table, found: Sequence[Line]) -> bytes:
    """A PNG: a dot for each seed and a stroke for their mean, or curves over training."""
    drawn = figure.Figure(figsize=(7, 1.2 + 0.4 * max(len(found), 5)), layout="constrained")
    axes = drawn.add_subplot()
    axes.set_title(table.title, fontsize=10)
    if table.x == "step":
        _draw_curves(axes, found)
    else:
        _draw_rows(axes, found)
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()


def _draw_rows(axes: Any, found: Sequence[Line]) -> None:
    for place, line in enumerate(found):
        values = list(line.miou.values())
        axes.plot(values, [place] * len(values), "o", color=COLOURS[0], alpha=0.6)
        axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=COLOURS[1], linewidth=2)
    labels = [f"{line.label}\n{line.labeled} + {line.unlabeled} images" for line in found]
    axes.set_yticks(range(len(found)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("mIoU, %")
    axes.grid(axis="x", alpha=0.3)


def _draw_curves(axes: Any, found: Sequence[Line]) -> None:
    for number, line in enumerate(found):
        colour = COLOURS[number % len(COLOURS)]
        curves = list(line.curve.values())
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=colour, alpha=0.3, linewidth=1)
        steps = sorted(set.intersection(*({step for step, _ in curve} for curve in curves)))
        means = [np.mean([dict(curve)[step] for curve in curves]) for step in steps]
        axes.plot(steps, means, color=colour, linewidth=2, label=line.label)
    axes.set_xlabel("step")
    axes.set_ylabel("mIoU, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
