"""Sections of plots: training curves, confusion matrix, weak against strong norm."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from semiseg_jax.eval_protocol import SELECTIONS
from semiseg_jax.reporting import artifacts
from semiseg_jax.reporting import plots as plots_lib
from semiseg_jax.reporting.markup import Section, data_uri
from semiseg_jax.reporting.run import Run, StageReport, read
from semiseg_jax.results import ResultRow
from semiseg_jax.runtime import metric_writer
from semiseg_jax.runtime.errors import UserError

_MAX_CONFUSIONS = 8

# Scalars to plot: name, title, factor, and whether only students have the scalar.
_CURVES = (
    ("loss_labeled", "loss of labelled images", 1, False),
    ("loss_pseudo", "loss of pseudo-labelled images", 1, True),
    ("loss", "total loss", 1, False),
    ("loss_strong", "loss of strong views", 1, True),
    ("loss_strong_1", "loss of the first strong views", 1, True),
    ("loss_strong_2", "loss of the second strong views", 1, True),
    ("loss_dropped", "loss of weak views with dropped channels", 1, True),
    ("loss_mixed", "loss of mixed images", 1, True),
    ("loss_consistency", "consistency loss", 1, True),
    ("loss_attention", "loss of the attention branch", 1, True),
    ("loss_classes", "loss of the image classifier", 1, True),
    ("loss_adversarial_labeled", "adversarial loss of labelled images", 1, True),
    ("loss_adversarial_unlabeled", "adversarial loss of unlabelled images", 1, True),
    ("loss_matching", "distance of the discriminator's mean features", 1, True),
    ("loss_self_training", "self-training loss of what the discriminator passes", 1, True),
    ("loss_discriminator", "loss of the discriminator", 1, True),
    ("accuracy_real", "labels that the discriminator takes for real, %", 100, True),
    ("accuracy_fake", "predictions that the discriminator takes for fake, %", 100, True),
    ("passed", "unlabelled predictions above the discriminator's threshold, %", 100, True),
    ("kept", "unlabelled pixels that have a loss, %", 100, True),
    ("learning_rate", "learning rate of the backbone", 1, False),
    ("mean_w", "mean of the weight w over pseudo-labelled pixels", 1, True),
    ("agreement", "agreement of student and pseudo-label, % of pixels", 100, True),
    ("kept_labeled", "labelled pixels that OHEM keeps, %", 100, False),
    ("accuracy_labeled", "training accuracy on labelled images, % of pixels", 100, False),
    ("gradient_norm", "gradient norm", 1, False),
    ("input_wait", "time spent waiting for input, %", 100, False),
    ("images_per_second", "images per second", 1, False),
)


def curves(run: Run) -> Section:
    """Builds the section with a plot of the mIoU and of each training scalar."""
    pictures = []
    if run.rows:
        latest = run.rows[-1].protocol
        rows = [row for row in (*run.curve, *run.rows) if row.protocol.is_comparable(latest)]
        pictures.append(_miou_plot(run, rows))
    for name, title, factor, student_only in _CURVES:
        lines = [
            _stage_curve(stage, [(step, factor * value) for step, value in stage.scalar(name)])
            for stage in run.stages
            if stage.kind == "student" or not student_only
        ]
        if any(line.points for line in lines):
            plot = plots_lib.plot_curves(title, lines)
            pictures.append({"title": title, "src": data_uri(plot, "svg+xml")})
    stages = [s.name for s in run.stages if s.done and not s.history]
    missing = f"{metric_writer.METRICS_FILE} is missing for {', '.join(stages)}." if stages else ""
    if not pictures:
        missing = "No metrics yet: no stage has written any."
    return {"pictures": pictures, "missing": missing}


def _stage_curve(stage: StageReport, points: Sequence[tuple[float, float]]) -> plots_lib.Curve:
    """Returns the curve of a stage; the steps of the points are those within the stage."""
    shifted = [(stage.begins + step, value) for step, value in points]
    colour = plots_lib.stage_colour(stage.number)
    return plots_lib.Curve(stage.name, colour, stage.kind == "control", shifted)


def _miou_plot(run: Run, rows: Sequence[ResultRow]) -> dict[str, str]:
    """Plots the mIoU over the run; the curve of a stage starts at the score of its initial weights.

    With `eval.select` the last point of a stage is the score of the selected weights, whichever
    step they are from.
    """
    title = "mIoU on the evaluation set, %"
    if rows[0].protocol.selection != SELECTIONS["last"]:
        title = "mIoU, % (last point of a stage: selected weights)"
    final_scores = {row.stage_key: row.miou_percent for row in run.rows if row in rows}
    lines = []
    for stage in run.stages:
        points = sorted((r.step, r.miou_percent) for r in rows if r.stage_key == stage.key)
        initial = ("student", stage.round - 1) if stage.kind == "student" else ("teacher", 0)
        if initial not in final_scores:
            initial = ("teacher", 0)
        if points and stage.kind != "teacher" and initial in final_scores:
            points.insert(0, (0, final_scores[initial]))
        lines.append(_stage_curve(stage, points))
    plot = plots_lib.plot_curves(title, lines, dots=True)
    return {"title": title, "src": data_uri(plot, "svg+xml")}


def confusion(run: Run) -> Section:
    """Builds the section with the last stage's confusion matrix and its largest confusions."""
    if not run.scored:
        return {"missing": "No confusion matrix yet: no stage has stored one.", "stage": ""}
    stage = run.scored[-1]
    matrix = np.array(stage.evaluation["confusion"], np.int64)
    names = [name for name, _ in run.classes(len(matrix))]
    share = np.nan_to_num(plots_lib.row_shares(matrix))
    np.fill_diagonal(share, 0)
    largest = np.argsort(-share, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    cells = [np.unravel_index(index, share.shape) for index in largest]
    confused = [
        (names[row], names[column], f"{100 * share[row, column]:.0f}")
        for row, column in cells
        if share[row, column] >= 0.005
    ]
    src = data_uri(plots_lib.plot_confusion(matrix, names), "svg+xml")
    return {"missing": "", "stage": stage.name, "src": src, "confused": confused}


_NO_NORMS = "No student with a weak and a strong norm has finished yet."


def norms(run: Run) -> Section:
    """Builds the section with the weak against the strong norm of the last student."""
    stage, plots = _norm_plots(run)
    if stage is None:
        return {"missing": _NO_NORMS, "stage": "", "pictures": []}
    pictures = [{"title": layer, "src": data_uri(png, "png")} for layer, png in plots.items()]
    return {"missing": "", "stage": stage.name, "pictures": pictures}


def norms_picture(workdir: epath.PathLike) -> bytes:
    """Returns a PNG with the weak against the strong norm of the last student, side by side.

    Raises:
        UserError: no student with two norms has finished.
    """
    stage, plots = _norm_plots(read(workdir))
    if stage is None:
        raise UserError(
            f"{workdir}: {_NO_NORMS}",
            code="norms-missing",
        )
    return plots_lib.side_by_side(list(plots.values()))


def _norm_plots(run: Run) -> tuple[StageReport | None, dict[str, bytes]]:
    """Returns the last student with two norms, and a PNG of each of its stored layers by name."""
    for stage in reversed(run.stages):
        layers = artifacts.read_norms(stage.folder) if stage.done else None
        if stage.kind == "student" and layers and all(len(v["mean"]) == 2 for v in layers.values()):
            return stage, {name: plots_lib.plot_norms(name, v) for name, v in layers.items()}
    return None, {}
