"""WORKDIR/report.html, a page of all that a run shows: python -m semiseg_jax.report --workdir=DIR

A run writes it at the end of each stage. It is one file that needs no network and no script. It is
made from what lies in the workdir; what is missing there is said in a sentence in its place.
"""

import base64
import dataclasses
import datetime
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from absl import app, flags
from etils import epath
from flax import traverse_util
from jaxtyping import UInt8

from configs import default
from semiseg_jax import command_line, figures, history, record
from semiseg_jax.data import labels
from semiseg_jax.data.streams import stage_name
from semiseg_jax.errors import UserError
from semiseg_jax.evaluate import comparable
from semiseg_jax.health import HEALTH
from semiseg_jax.pseudo_labels import PSEUDO_LABELS
from semiseg_jax.train import DONE

FILE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
# Images of the gallery that are best, median and worst; and that gained or lost most.
_OF_A_KIND, _OF_A_CHANGE = 2, 1
# Images of the picture that stands alone.
_IN_A_PICTURE = 4
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

Section = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run, as far as it has come.

    Attributes:
        number: among all that the config asks for.
        kind, round: as in `train.Stage`.
        begins: steps of the run before it.
        folder: its own.
        done: it has ended.
        evaluation: what `record.keep_evaluation` wrote; None where it is missing.
    """

    number: int
    kind: str
    round: int
    begins: int
    folder: epath.Path
    done: bool
    evaluation: Any

    @property
    def name(self) -> str:
        """For people."""
        return stage_name(self.kind, self.round)

    @functools.cached_property
    def history(self) -> list[dict[str, Any]]:
        """Its scalars."""
        return history.read(self.folder)


@dataclasses.dataclass(frozen=True)
class Run:
    """What lies in a workdir.

    Attributes:
        workdir: of the run.
        config: config.json.
        about: run.json; None where it is missing.
        rows, curve: of results.json.
        stages: that the config asks for, done or not.
    """

    workdir: epath.Path
    config: dict[str, Any]
    about: Any
    rows: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    stages: list[Stage]

    @property
    def scored(self) -> list[Stage]:
        """Teacher and students that have ended and say how each image fared, by one protocol."""
        found = [s for s in self.stages if s.done and s.evaluation and s.kind != "control"]
        return [
            s
            for s in found
            if s.evaluation["gallery"] == found[-1].evaluation["gallery"]
            and comparable(s.evaluation["protocol"], found[-1].evaluation["protocol"])
        ]


def read(workdir: epath.PathLike) -> Run:
    """Reads a workdir.

    Raises:
        UserError: it is not that of a run.
    """
    workdir = epath.Path(workdir)
    config = record.read_json(workdir / "config.json")
    if config is None:
        raise UserError(
            f"{workdir} has no config.json: give the --workdir of a run that has begun."
        )
    results = record.read_json(workdir / "results.json") or {"rows": [], "curve": []}
    about = record.read_json(workdir / record.RUN)
    stages = list(_stages(workdir, config))
    return Run(workdir, config, about, results["rows"], results["curve"], stages)


def _stages(workdir: epath.Path, config: Mapping[str, Any]) -> Iterator[Stage]:
    rounds, train = config["rounds"], config["train"]
    wanted = [("teacher", 0, 0)]
    for round_ in range(1, rounds["count"] + 1):
        wanted.append(("student", round_, train["teacher_steps"] + (round_ - 1) * train["steps"]))
    if rounds["control"] and rounds["count"]:
        wanted.append(("control", rounds["count"], train["teacher_steps"]))
    for number, (kind, round_, begins) in enumerate(wanted):
        folder = workdir / f"round_{round_}" / kind
        evaluation = record.read_json(folder / record.EVALUATION)
        done = (folder / DONE).exists()
        yield Stage(number, kind, round_, begins, folder, done, evaluation)


def write(workdir: epath.PathLike) -> list[str]:
    """Writes report.html into a workdir.

    Returns:
        A sentence for each thing that is missing.

    Raises:
        UserError: the folder is not that of a run, or cannot be written.
    """
    run = read(workdir)
    sections = {
        "ran": _what_ran(run),
        "results": _results(run),
        "curves": _curves(run),
        "confusion": _confusion(run),
        "gallery": _gallery(run),
        "pseudo": _pseudo_labels(run),
        "health": _health(run),
        "norms": _norms(run),
    }
    done = [stage.name for stage in run.stages if stage.done]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(FILE).render(
        title=run.workdir.resolve().name,
        done=done,
        waiting=[stage.name for stage in run.stages if not stage.done],
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        legend=_legend(run),
        **sections,
    )
    labels.write_bytes(run.workdir / FILE, page.encode())
    return [section["missing"] for section in sections.values() if section["missing"]]


# --- What ran, and with what result --------------------------------------------------------------


def _what_ran(run: Run) -> Section:
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


def _results(run: Run) -> Section:
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
    for number, (name, colour) in enumerate(_classes(run, len(rows[0]["iou"]))):
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


def _classes(run: Run, count: int) -> list[tuple[str, str]]:
    """Name and colour of each class; numbers where run.json is missing."""
    if run.about is None:
        return [(f"class {i}", _hex(c)) for i, c in enumerate(labels.generated_palette(count))]
    return _legend(run)


def _legend(run: Run) -> list[tuple[str, str]]:
    about = run.about or {"classes": [], "palette": []}
    return [(n, _hex(c)) for n, c in zip(about["classes"], about["palette"], strict=True)]


def _palette(run: Run) -> Sequence[Sequence[int]]:
    return run.about["palette"] if run.about else labels.generated_palette(labels.IGNORE)


def _hex(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in colour)


# --- Curves and matrices -------------------------------------------------------------------------


def _curves(run: Run) -> Section:
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
            pictures.append({"title": title, "src": _uri(drawn, "svg+xml")})
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
    """mIoU over the run; each stage begins where that which it starts from ended."""
    title = "mIoU on the evaluation set, %"
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
    return {"title": title, "src": _uri(figures.curves(title, lines, dots=True), "svg+xml")}


def _confusion(run: Run) -> Section:
    """The last stage's confusion matrix, and what it confuses most."""
    if not run.scored:
        return {"missing": "No stage has kept a confusion matrix yet.", "stage": ""}
    stage = run.scored[-1]
    matrix = np.array(stage.evaluation["confusion"], np.int64)
    names = [name for name, _ in _classes(run, len(matrix))]
    share = np.nan_to_num(figures.shares_of_rows(matrix))
    np.fill_diagonal(share, 0)
    most = np.argsort(-share, axis=None, kind="stable")[:_MOST_CONFUSED]
    places = [np.unravel_index(place, share.shape) for place in most]
    confused = [
        (names[row], names[column], f"{100 * share[row, column]:.0f}")
        for row, column in places
        if share[row, column] >= 0.005
    ]
    src = _uri(figures.confusion(matrix, names), "svg+xml")
    return {"missing": "", "stage": stage.name, "src": src, "confused": confused}


def _norms(run: Run) -> Section:
    """The weak against the strong norm of the last student's layers."""
    for stage in reversed(run.stages):
        kept = record.read_json(stage.folder / record.NORMS) if stage.done else None
        if stage.kind == "student" and kept and all(len(v["mean"]) == 2 for v in kept.values()):
            pictures = [
                {"title": layer, "src": _uri(figures.norms(layer, values), "png")}
                for layer, values in kept.items()
            ]
            return {"missing": "", "stage": stage.name, "pictures": pictures}
    sentence = "No student with a weak and a strong norm has ended yet."
    return {"missing": sentence, "stage": "", "pictures": []}


# --- Galleries -----------------------------------------------------------------------------------


def _gallery(run: Run) -> Section:
    """Evaluation images: best, median and worst of the last stage, and what changed most."""
    if not run.scored:
        return {"missing": "No stage has kept its predictions yet.", "cards": []}
    last, first = run.scored[-1], run.scored[0]
    folder = run.workdir / record.GALLERY / last.evaluation["gallery"]
    palette = _palette(run)
    cards = []
    for name, why in chosen(first, last).items():
        pictures = [
            _picture("image", folder / f"{name}.jpg", palette),
            _picture("truth", folder / f"{name}.png", palette),
        ]
        for stage in run.scored:
            score = _percent(stage.evaluation["miou_by_image"].get(name))
            pictures.append(_picture(stage.name, _seen_by(stage, name), palette, score))
        maps = folder / f"{name}.png", _seen_by(first, name), _seen_by(last, name)
        title = "right or wrong" if first is last else "difference"
        pictures.append(_drawn_of(title, figures.differences, *maps))
        cards.append({"name": name, "why": ", ".join(why), "pictures": pictures})
    words = ("right", "", "", "wrong") if first is last else figures.DIFFERENCES
    colours = figures.DIFFERENCES.values()
    return {
        "missing": "",
        "cards": cards,
        "differences": [(w, _hex(c)) for w, c in zip(words, colours, strict=True) if w],
        "kept": len(last.evaluation["kept"]),
        "of": len(last.evaluation["miou_by_image"]),
        "by": last.name,
        "earlier": "" if first is last else first.name,
    }


def _seen_by(stage: Stage, name: str) -> epath.Path:
    return stage.folder / record.PREDICTIONS / f"{name}.png"


def _drawn_of(title: str, draw: Callable[..., bytes], *paths: epath.Path) -> dict[str, str]:
    """A picture drawn of label maps; no `src` where one of them is missing."""
    maps = [_map_of(path) for path in paths]
    complete = all(map_ is not None for map_ in maps)
    return {"title": title, "score": "", "src": _uri(draw(*maps), "png") if complete else ""}


def chosen(first: Stage, last: Stage) -> dict[str, list[str]]:
    """Images of the gallery, and why each is shown.

    Args:
        first: the teacher.
        last: the stage that images are chosen by.
    """
    scores = last.evaluation["miou_by_image"]
    before = first.evaluation["miou_by_image"]
    ranked = sorted((scores[n], n) for n in last.evaluation["kept"] if scores[n] is not None)
    names = [name for _, name in ranked]
    middle = max((len(names) - _OF_A_KIND) // 2, 0)
    picked = [("best", name) for name in names[::-1][:_OF_A_KIND]]
    picked += [("median", name) for name in names[middle : middle + _OF_A_KIND]]
    picked += [("worst", name) for name in names[:_OF_A_KIND]]
    if first is not last:
        gains = sorted((scores[n] - (before.get(n) or 0.0), n) for n in names)
        picked += [("gained most", name) for _, name in gains[::-1][:_OF_A_CHANGE]]
        picked += [("lost most", name) for _, name in gains[:_OF_A_CHANGE]]
    found: dict[str, list[str]] = {}
    for why, name in picked:
        found.setdefault(name, []).append(why)
    return found


def _pseudo_labels(run: Run) -> Section:
    """Label maps of the last stage that labelled: least confident, most changed."""
    for place in range(len(run.stages) - 1, -1, -1):
        stage = run.stages[place]
        kept = record.read_json(stage.folder / f"{record.PSEUDO_GALLERY}.json")
        if kept is None:
            continue
        why: dict[str, list[str]] = {}
        for name, share in kept["least_confident"].items():
            why.setdefault(name, []).append(f"mean confidence {100 * share:.0f} %")
        for name, share in kept["most_changed"].items():
            why.setdefault(name, []).append(f"{100 * share:.0f} % changed")
        before = run.stages[place - 1] if place else None
        cards = [
            {
                "name": name,
                "why": ", ".join(reasons),
                "pictures": _pseudo_pictures(run, stage, before, name),
            }
            for name, reasons in why.items()
        ]
        return {"missing": "", "stage": stage.name, "cards": cards}
    return {"missing": "No pseudo-labels have been made yet.", "stage": "", "cards": []}


def _pseudo_pictures(
    run: Run, stage: Stage, before: Stage | None, name: str
) -> list[dict[str, str]]:
    palette = _palette(run)
    now = stage.folder / PSEUDO_LABELS / f"{name}.png"
    image = stage.folder / record.PSEUDO_GALLERY / f"{name}.jpg"
    pictures = [_picture("image", image, palette)]
    if before is None:
        return [*pictures, _picture(f"by {stage.name}", now, palette)]
    then = before.folder / PSEUDO_LABELS / f"{name}.png"
    return [
        *pictures,
        _picture(f"by {before.name}", then, palette),
        _picture(f"by {stage.name}", now, palette),
        _drawn_of("changed", figures.changes, then, now),
    ]


def _picture(
    title: str, path: epath.Path, palette: Sequence[Sequence[int]], score: str = ""
) -> dict[str, str]:
    """A picture of a card: a JPEG as it is, a label map in its colours; no `src` without a file."""
    picture = {"title": title, "score": score, "src": ""}
    if path.suffix == ".jpg" and path.exists():
        picture["src"] = _uri(path.read_bytes(), "jpeg")
    elif (classes := _map_of(path)) is not None:
        picture["src"] = _uri(labels.encode_mask(classes, palette), "png")
    return picture


_ALL_IDS = labels.id_table(labels.IGNORE)


def _map_of(path: epath.Path) -> UInt8[np.ndarray, "h w"] | None:
    """A kept label map, made small; None where it is missing or damaged."""
    try:
        return record.small(labels.read_mask(path, _ALL_IDS))
    except UserError:
        return None


def picture(workdir: epath.PathLike) -> bytes:
    """A PNG of evaluation images: image, truth, what the teacher and the last student see.

    The images are spaced evenly in the list; none is picked for how it came out.

    Raises:
        UserError: no stage of the run has ended, or one of its pictures is missing.
    """
    run = read(workdir)
    if not run.scored or run.about is None:
        raise UserError(f"{workdir} has no stage that has ended: there is nothing to show yet.")
    first, last = run.scored[0], run.scored[-1]
    stages = [first] if first is last else [first, last]
    folder = run.workdir / record.GALLERY / last.evaluation["gallery"]
    colours = labels.full_palette(run.about["palette"])
    kept = last.evaluation["kept"]
    rows = []
    for name in kept[:: -(-len(kept) // _IN_A_PICTURE)]:
        maps = [folder / f"{name}.png", *(_seen_by(stage, name) for stage in stages)]
        coloured = [colours[labels.read_mask(path, _ALL_IDS)] for path in maps]
        rows.append([labels.read_image(folder / f"{name}.jpg"), *coloured])
    titles = ["image", "truth", *(stage.name for stage in stages)]
    classes = zip(run.about["classes"], run.about["palette"], strict=True)
    return figures.sheet(titles, rows, classes)


# --- Health --------------------------------------------------------------------------------------


def _health(run: Run) -> Section:
    """What `health` found, a column a round."""
    found = [(s, record.read_json(s.folder / PSEUDO_LABELS / HEALTH)) for s in run.stages]
    rounds = [(stage, content) for stage, content in found if content is not None]
    if not rounds:
        return {"missing": "No pseudo-labels have been looked at yet.", "rounds": []}
    of_labels = rounds[0][1]["labeled_share"]
    return {
        "missing": "",
        "rounds": [f"by {stage.name}" for stage, _ in rounds],
        "lines": [
            ("mean confidence", [f"{c['mean_confidence']:.3f}" for _, c in rounds]),
            ("pixels changed, %", [_percent(c.get("changed")) for _, c in rounds]),
            ("classes' shares moved, %", [_percent(c.get("drift")) for _, c in rounds]),
            ("pixels left out, %", [_percent(c["ignored"]) for _, c in rounds]),
        ],
        "shares": [
            {
                "name": name,
                "colour": colour,
                "labelled": _percent(of_labels[name]),
                "values": [_percent(c["class_share"][name]) for _, c in rounds],
            }
            for name, (_, colour) in zip(of_labels, _classes(run, len(of_labels)), strict=True)
        ],
        "warnings": [(stage.name, c["warnings"]) for stage, c in rounds if c["warnings"]],
    }


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


# --- Files into the page -------------------------------------------------------------------------


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def main(argv: list[str]) -> None:
    """Writes the report of the command line's workdir."""
    command_line.options_only(argv)
    workdir = flags.FLAGS.workdir
    if not workdir:
        sys.exit("Error: Say which run, such as --workdir=runs/streets.")
    try:
        missing = write(workdir)
        if flags.FLAGS.picture:
            labels.write_bytes(flags.FLAGS.picture, picture(workdir))
    except UserError as error:
        sys.exit(f"Error: {error}")
    print(epath.Path(workdir) / FILE)
    for sentence in missing:
        print(sentence)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The run to report on, such as runs/streets.")
    flags.DEFINE_string(
        "picture", None, "A PNG to write as well: some images, what is in them, what is seen."
    )
    app.run(main, flags_parser=command_line.parse)
