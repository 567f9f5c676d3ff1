"""Sections of tables: config and environment, results, IoU by class, health of pseudo-labels."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from semiseg_jax import fitted_settings
from semiseg_jax.eval_protocol import EvalProtocol
from semiseg_jax.pseudo_label_stats import read_stats
from semiseg_jax.pseudo_labels import PSEUDO_LABELS
from semiseg_jax.reporting import artifacts
from semiseg_jax.reporting.markup import Section, percent
from semiseg_jax.reporting.run import Run, find_row, group_comparable
from semiseg_jax.results import ResultRow


def what_ran(run: Run, defaults: Mapping[str, Any]) -> Section:
    """Builds the section on config, data, devices and versions.

    Args:
        run: the run.
        defaults: the default config; keys that differ from it are listed.
    """
    flat = traverse_util.flatten_dict(run.config, sep=".")
    default_values = traverse_util.flatten_dict(dict(defaults), sep=".")
    changed = [
        (key, _format_value(value), _format_value(default_values.get(key)))
        for key, value in flat.items()
        if value != default_values.get(key)
    ]
    missing = []
    if run.about is None:
        missing.append(
            f"{artifacts.RUN} is missing: start the run again to list data and devices here."
        )
    if run.chosen is None:
        missing.append(
            f"{fitted_settings.FITTED} is damaged: restore it to list here what the run chose by "
            "itself."
        )
    model = run.config["model"]
    images = run.about["images"] if run.about else {}
    return {
        "images": ", ".join(f"{count} {kind}" for kind, count in images.items()),
        "network": f"{model['head']} on {model['backbone']}",
        "chosen": _chosen_by_reason(run, flat),
        "changed": changed,
        "config": json.dumps(run.config, indent=1, ensure_ascii=False),
        "about": run.about,
        "missing": " ".join(missing),
    }


def _chosen_by_reason(
    run: Run, flat: Mapping[str, Any]
) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Returns each reason with (key, this run's value, value in the given config) of its settings.

    A setting that a later start changed is left out: the run did not choose its present value.

    Args:
        run: the run.
        flat: its config by key.
    """
    by_reason: dict[str, list[tuple[str, str, str]]] = {}
    for key, setting in (run.chosen or {}).items():
        if flat.get(key) == setting["value"]:
            values = _format_value(setting["value"]), _format_value(setting["given"])
            by_reason.setdefault(setting.get("reason", ""), []).append((key, *values))
    return list(by_reason.items())


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def results(run: Run) -> Section:
    """Builds a table per protocol; results of different protocols are not comparable."""
    missing = "" if run.rows else "No results yet: no stage has finished."
    # The current protocol is that of the newest row.
    groups = reversed(group_comparable(run.rows))
    return {"tables": [_results_table(run, group) for group in groups], "missing": missing}


def _results_table(run: Run, rows: Sequence[ResultRow]) -> dict[str, Any]:
    teacher = find_row(rows, "teacher")
    last_student = find_row(rows[::-1], "student")
    by_stage = {row.stage_key: row for row in rows}
    stages = {stage.key: stage for stage in run.stages}
    lines = []
    for row in rows:
        kind, round_ = row.stage_key
        stage = stages.get((kind, round_))
        control = by_stage.get(("control", round_)) if kind == "student" else None
        lines.append(
            {
                "name": row.stage_name,
                "steps": row.step,
                "miou": f"{row.miou_percent:.2f}",
                "student": _format_miou(row.student_miou),
                "unlabeled": _format_miou(row.unlabeled_miou),
                "over_teacher": _format_gain(row, teacher) if row is not teacher else "",
                "over_control": _format_gain(row, control),
                "pixel_accuracy": f"{100 * row.pixel_accuracy:.2f}",
                "class_accuracy": f"{100 * row.mean_class_accuracy:.2f}",
                "minutes": f"{stage.seconds / 60:.1f}" if stage and stage.seconds else "",
            }
        )
    return {
        "has_averages": any(row.student_miou is not None for row in rows),
        "has_unlabeled": any(row.unlabeled_miou is not None for row in rows),
        "labels": [
            (row.stage_name, _describe_labels(run, row.labels), row.labels["warnings"])
            for row in rows
            if row.labels is not None
        ],
        "protocol": _format_protocol(rows[0].protocol),
        "lines": lines,
        "classes": _iou_by_class(run, rows, teacher, last_student),
        "last": last_student and last_student.stage_name,
    }


def _format_miou(miou: float | None) -> str:
    return "" if miou is None else f"{100 * miou:.2f}"


def _describe_labels(run: Run, labels: Mapping[str, Any]) -> str:
    """Returns the shares of unlabelled pixels that had a loss, in all and by class."""
    shares = labels["kept_by_class"]
    by_class = ", ".join(
        f"{name} {percent(share)} %"
        for (name, _), share in zip(run.classes(len(shares)), shares, strict=True)
        if share is not None
    )
    return f"{percent(labels['kept'])} % of the unlabelled pixels had a loss; by label {by_class}"


def _format_gain(row: ResultRow, baseline: ResultRow | None) -> str:
    return "" if baseline is None else f"{100 * (row.miou - baseline.miou):+z.2f}"


def _format_protocol(protocol: EvalProtocol) -> str:
    scales = ", ".join(f"{scale:g}" for scale in protocol.scales)
    window = protocol.window
    inputs = (
        "whole images"
        if isinstance(window, str)
        else f"windows of {' × '.join(map(str, window['size']))} pixels"
    )
    return (
        f"{protocol.data}, {protocol.split} set; {inputs}, "
        f"{'scales' if len(protocol.scales) > 1 else 'scale'} {scales}, "
        f"{'with' if protocol.flip else 'without'} mirrored images; "
        f"{protocol.selection} checkpoint; seed {protocol.seed}"
    )


def _iou_by_class(
    run: Run, rows: Sequence[ResultRow], teacher: ResultRow | None, student: ResultRow | None
) -> list[dict[str, Any]]:
    """Returns the IoU of each class in each stage, in percent, and the student's gain."""
    lines = []
    for number, (name, colour) in enumerate(run.classes(len(rows[0].iou))):
        values = [row.iou[number] for row in rows]
        gain = ""
        if teacher and student:
            before, after = teacher.iou[number], student.iou[number]
            if before is not None and after is not None:
                gain = f"{100 * (after - before):+z.1f}"
        texts = [percent(value) for value in values]
        lines.append({"name": name, "colour": colour, "values": texts, "gain": gain})
    return lines


def health(run: Run) -> Section:
    """Builds the section on the health of the pseudo-labels, with a column per round."""
    contents = [(s, read_stats(s.folder / PSEUDO_LABELS)) for s in run.stages]
    rounds = [(stage, content) for stage, content in contents if content is not None]
    if not rounds:
        missing = (
            "No pseudo-labels have been checked yet."
            if run.stores_pseudo_labels
            else "This run stores no pseudo-labels. Where a method labels inside its steps, the "
            "results say how many unlabelled pixels had a loss."
        )
        return {"missing": missing, "rounds": []}
    labeled_share = rounds[0][1]["labeled_share"]
    # A file of other classes belongs to another run.
    rounds = [(s, c) for s, c in rounds if c["class_share"].keys() == labeled_share.keys()]
    return {
        "missing": "",
        "rounds": [f"by {stage.name}" for stage, _ in rounds],
        "lines": [
            ("mean confidence", [f"{c['mean_confidence']:.3f}" for _, c in rounds]),
            ("changed pixels, %", [percent(c.get("changed")) for _, c in rounds]),
            ("change of class shares, %", [percent(c.get("drift")) for _, c in rounds]),
            ("ignored pixels, %", [percent(c["ignored"]) for _, c in rounds]),
        ],
        "shares": [
            {
                "name": name,
                "colour": colour,
                "labelled": percent(labeled_share[name]),
                "values": [percent(c["class_share"][name]) for _, c in rounds],
            }
            for name, (_, colour) in zip(
                labeled_share, run.classes(len(labeled_share)), strict=True
            )
        ],
        "warnings": [(stage.name, c["warnings"]) for stage, c in rounds if c["warnings"]],
    }
