"""The sections of tables: what ran, results and IoU by class, health of the pseudo-labels."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from configs import default
from semiseg_jax import record
from semiseg_jax.data import labels
from semiseg_jax.data.streams import stage_name
from semiseg_jax.evaluate import comparable
from semiseg_jax.health import HEALTH
from semiseg_jax.pseudo_labels import PSEUDO_LABELS
from semiseg_jax.reporting.markup import Section, percent
from semiseg_jax.reporting.run import Run, Stage


def what_ran(run: Run) -> Section:
    """The keys that differ from the defaults, the whole config, data, devices and versions."""
    flat = traverse_util.flatten_dict(run.config, sep=".")
    defaults = json.loads(default.get_config().to_json_best_effort())
    usual = traverse_util.flatten_dict(defaults, sep=".")
    changed = [
        (key, _plain(value), _plain(usual.get(key)))
        for key, value in flat.items()
        if value != usual.get(key)
    ]
    missing = ""
    if run.about is None:
        missing = f"{record.RUN} is missing: start the run again to have data and devices here."
    model = run.config["model"]
    images = run.about["images"] if run.about else {}
    return {
        "images": ", ".join(f"{count} {kind}" for kind, count in images.items()),
        "network": f"{model['head']} on {model['backbone']}",
        "changed": changed,
        "config": json.dumps(run.config, indent=1, ensure_ascii=False),
        "about": run.about,
        "missing": missing,
    }


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def results(run: Run) -> Section:
    """A table for every protocol, because results of different ones are not to be compared."""
    groups: list[list[dict[str, Any]]] = []
    for row in run.rows:
        same = (g for g in groups if comparable(g[0]["protocol"], row["protocol"]))
        group = next(same, None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    missing = "" if run.rows else "No stage has ended yet: there is no result."
    # The present protocol is the one that was added last.
    return {"tables": [_table(run, group) for group in reversed(groups)], "missing": missing}


def _table(run: Run, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    teacher = next((r for r in rows if r["stage"] == "teacher"), None)
    controls = {r["round"]: r for r in rows if r["stage"] == "control"}
    stages = {(s.kind, s.round): s for s in run.stages}
    lines = []
    for row in rows:
        stage = stages.get((row["stage"], row["round"]))
        control = controls.get(row["round"]) if row["stage"] == "student" else None
        lines.append(
            {
                "name": stage_name(row["stage"], row["round"]),
                "steps": row["step"],
                "miou": f"{100 * row['miou']:.2f}",
                "over_teacher": _gain(row, teacher) if row is not teacher else "",
                "over_control": _gain(row, control),
                "pixel_accuracy": f"{100 * row['pixel_accuracy']:.2f}",
                "class_accuracy": f"{100 * row['mean_class_accuracy']:.2f}",
                "minutes": _minutes(stage),
            }
        )
    last = next((r for r in reversed(rows) if r["stage"] == "student"), None)
    return {
        "protocol": _protocol(rows[0]["protocol"]),
        "lines": lines,
        "classes": _by_class(run, rows, teacher, last),
        "last": last and stage_name(last["stage"], last["round"]),
    }


def _gain(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    return "" if other is None else f"{100 * (row['miou'] - other['miou']):+z.2f}"


def _minutes(stage: Stage | None) -> str:
    seconds = sum(line["seconds"] for line in stage.history) if stage else 0
    return f"{seconds / 60:.1f}" if seconds else ""


def _protocol(protocol: Mapping[str, Any]) -> str:
    """How the results of a table were obtained, for people."""
    scales = ", ".join(f"{scale:g}" for scale in protocol["scales"])
    window = protocol["window"]
    seen = (
        "whole images"
        if window == "whole"
        else f"windows of {' × '.join(map(str, window['size']))} pixels"
    )
    return (
        f"{protocol['data']}, {protocol['split']} set; {seen}, scale {scales}, "
        f"{'mirrored too' if protocol['flip'] else 'not mirrored'}; {protocol['selection']} "
        f"checkpoint; seed {protocol['seed']}"
    )


def _by_class(
    run: Run, rows: Sequence[dict[str, Any]], teacher: Any, last: Any
) -> list[dict[str, Any]]:
    """IoU of each class in each stage, in percent, and what the last student gained."""
    found = []
    for number, (name, colour) in enumerate(run.classes(len(rows[0]["iou"]))):
        values = [row["iou"][number] for row in rows]
        gain = ""
        if (
            teacher
            and last
            and None not in (new := last["iou"][number], old := teacher["iou"][number])
        ):
            gain = f"{100 * (new - old):+z.1f}"
        texts = ["–" if v is None else f"{100 * v:.1f}" for v in values]
        found.append({"name": name, "colour": colour, "values": texts, "gain": gain})
    return found


def health(run: Run) -> Section:
    """What `health` found, a column a round."""
    found = [(s, labels.read_json(s.folder / PSEUDO_LABELS / HEALTH)) for s in run.stages]
    rounds = [(stage, content) for stage, content in found if content is not None]
    if not rounds:
        return {"missing": "No pseudo-labels have been looked at yet.", "rounds": []}
    of_labels = rounds[0][1]["labeled_share"]
    return {
        "missing": "",
        "rounds": [f"by {stage.name}" for stage, _ in rounds],
        "lines": [
            ("mean confidence", [f"{c['mean_confidence']:.3f}" for _, c in rounds]),
            ("pixels changed, %", [percent(c.get("changed")) for _, c in rounds]),
            ("classes' shares moved, %", [percent(c.get("drift")) for _, c in rounds]),
            ("pixels left out, %", [percent(c["ignored"]) for _, c in rounds]),
        ],
        "shares": [
            {
                "name": name,
                "colour": colour,
                "labelled": percent(of_labels[name]),
                "values": [percent(c["class_share"][name]) for _, c in rounds],
            }
            for name, (_, colour) in zip(of_labels, run.classes(len(of_labels)), strict=True)
        ],
        "warnings": [(stage.name, c["warnings"]) for stage, c in rounds if c["warnings"]],
    }
