"""The sections of drawings: curves, confusion matrix, weak against strong norm."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from semiseg_jax import figures, history, record
from semiseg_jax.data import labels
from semiseg_jax.errors import UserError
from semiseg_jax.evaluate import SELECTIONS, comparable
from semiseg_jax.reporting.markup import Section, data_uri
from semiseg_jax.reporting.run import Run, Stage, read

_MOST_CONFUSED = 8

# Scalars that are drawn: name, title, factor, and whether students alone have them.
_CURVES = (
    ("loss_labeled", "loss of labelled images", 1, False),
    ("loss_pseudo", "loss of pseudo-labelled images", 1, True),
    ("loss", "loss, both together", 1, False),
    ("learning_rate", "learning rate of the backbone", 1, False),
    ("mean_w", "w, mean over pseudo-labelled pixels", 1, True),
    ("agreement", "student agrees with pseudo-label, % of pixels", 100, True),
    ("accuracy_labeled", "accuracy in labelled batches, % of pixels", 100, False),
    ("gradient_norm", "norm of the gradient", 1, False),
    ("input_wait", "waiting for input, % of the time", 100, False),
    ("images_per_second", "images per second", 1, False),
)


def curves(run: Run) -> Section:
    """mIoU and the scalars of training, a picture each."""
    pictures = []
    scored = [*run.curve, *run.rows]
    if run.rows:
        latest = run.rows[-1]["protocol"]
        scored = [row for row in scored if comparable(row["protocol"], latest)]
        pictures.append(_picture_of_scores(run, scored))
    for key, title, factor, of_students in _CURVES:
        lines = [
            _curve(
                stage,
                [(line["step"], factor * line[key]) for line in stage.history if key in line],
            )
            for stage in run.stages
            if stage.kind == "student" or not of_students
        ]
        if any(line.points for line in lines):
            drawn = figures.curves(title, lines)
            pictures.append({"title": title, "src": data_uri(drawn, "svg+xml")})
    missing = [s.name for s in run.stages if s.done and not s.history]
    sentence = f"{history.FILE} is missing for {', '.join(missing)}." if missing else ""
    if not pictures:
        sentence = "No stage has written a line of metrics yet."
    return {"pictures": pictures, "missing": sentence}


def _curve(stage: Stage, points: Sequence[tuple[float, float]]) -> figures.Curve:
    shifted = [(stage.begins + step, value) for step, value in points]
    colour = figures.colour_of(stage.number)
    return figures.Curve(stage.name, colour, stage.kind == "control", shifted)


def _picture_of_scores(run: Run, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """mIoU over the run; each stage begins where that which it starts from ended.

    Where weights are chosen (`eval.select`), the last point of a stage is the score of the chosen
    ones, whatever step they are of.
    """
    title = "mIoU on the evaluation set, %"
    if rows[0]["protocol"]["selection"] != SELECTIONS["last"]:
        title += "; the last point of a stage is of the weights that were chosen"
    ends = {(r["stage"], r["round"]): 100 * r["miou"] for r in run.rows if r in rows}
    lines = []
    for stage in run.stages:
        mine = [r for r in rows if (r["stage"], r["round"]) == (stage.kind, stage.round)]
        points = sorted((r["step"], 100 * r["miou"]) for r in mine)
        before = ("student", stage.round - 1) if stage.kind == "student" else ("teacher", 0)
        before = before if before in ends else ("teacher", 0)
        if points and stage.kind != "teacher" and before in ends:
            points.insert(0, (0, ends[before]))
        lines.append(_curve(stage, points))
    return {"title": title, "src": data_uri(figures.curves(title, lines, dots=True), "svg+xml")}


def confusion(run: Run) -> Section:
    """The last stage's confusion matrix, and what it confuses most."""
    if not run.scored:
        return {"missing": "No stage has kept a confusion matrix yet.", "stage": ""}
    stage = run.scored[-1]
    matrix = np.array(stage.evaluation["confusion"], np.int64)
    names = [name for name, _ in run.classes(len(matrix))]
    share = np.nan_to_num(figures.shares_of_rows(matrix))
    np.fill_diagonal(share, 0)
    most = np.argsort(-share, axis=None, kind="stable")[:_MOST_CONFUSED]
    places = [np.unravel_index(place, share.shape) for place in most]
    confused = [
        (names[row], names[column], f"{100 * share[row, column]:.0f}")
        for row, column in places
        if share[row, column] >= 0.005
    ]
    src = data_uri(figures.confusion(matrix, names), "svg+xml")
    return {"missing": "", "stage": stage.name, "src": src, "confused": confused}


_NO_NORMS = "No student with a weak and a strong norm has ended yet."


def norms(run: Run) -> Section:
    """The weak against the strong norm of the last student's layers."""
    stage, drawn = _drawn_norms(run)
    if stage is None:
        return {"missing": _NO_NORMS, "stage": "", "pictures": []}
    shown = [{"title": layer, "src": data_uri(png, "png")} for layer, png in drawn.items()]
    return {"missing": "", "stage": stage.name, "pictures": shown}


def norms_picture(workdir: epath.PathLike) -> bytes:
    """A PNG of the weak against the strong norm of the last student's layers, side by side.

    Raises:
        UserError: no student with two norms has ended.
    """
    stage, drawn = _drawn_norms(read(workdir))
    if stage is None:
        raise UserError(f"{workdir}: {_NO_NORMS}")
    return figures.side_by_side(list(drawn.values()))


def _drawn_norms(run: Run) -> tuple[Stage | None, dict[str, bytes]]:
    """The last student with two norms, and a PNG of each of its kept layers, by name."""
    for stage in reversed(run.stages):
        kept = labels.read_json(stage.folder / record.NORMS) if stage.done else None
        if stage.kind == "student" and kept and all(len(v["mean"]) == 2 for v in kept.values()):
            return stage, {layer: figures.norms(layer, v) for layer, v in kept.items()}
    return None, {}
