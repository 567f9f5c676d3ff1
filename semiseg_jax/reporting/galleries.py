"""Sections of pictures: evaluation images and pseudo-labels; and a contact sheet of predictions."""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from jaxtyping import UInt8

from semiseg_jax.data import image_io
from semiseg_jax.pseudo_labels import PSEUDO_LABELS
from semiseg_jax.reporting import artifacts, plots
from semiseg_jax.reporting.markup import Section, colour_code, data_uri, percent
from semiseg_jax.reporting.run import Run, StageReport, read
from semiseg_jax.runtime.errors import UserError

# Number of best, median and worst images in the gallery; and of most improved and most worsened.
_NUM_RANKED, _NUM_CHANGED = 2, 1
# Images of the contact sheet.
_NUM_SHEET_IMAGES = 4


def gallery(run: Run) -> Section:
    """Builds the section of evaluation images: best, median, worst and most changed."""
    if not run.scored:
        return {"missing": "No predictions yet: no stage has stored any.", "cards": []}
    last, first = run.scored[-1], run.scored[0]
    folder = run.workdir / artifacts.GALLERY / last.evaluation["gallery"]
    palette = run.palette
    cards = []
    for name, reasons in select_images(first, last).items():
        pictures = [
            _picture("image", folder / f"{name}.jpg", palette),
            _picture("label", folder / f"{name}.png", palette),
        ]
        for stage in run.scored:
            score = percent(stage.evaluation["miou_by_image"].get(name))
            pictures.append(_picture(stage.name, _prediction_path(stage, name), palette, score))
        maps = folder / f"{name}.png", _prediction_path(first, name), _prediction_path(last, name)
        title = "correct or wrong" if first is last else "difference"
        pictures.append(_plotted_picture(title, plots.plot_differences, *maps))
        cards.append({"name": name, "why": ", ".join(reasons), "pictures": pictures})
    return {
        "missing": "",
        "cards": cards,
        "differences": _difference_legend(first, last),
        "num_stored": len(last.evaluation["kept"]),
        "num_images": len(last.evaluation["miou_by_image"]),
        "stage": last.name,
    }


def _difference_legend(first: StageReport, last: StageReport) -> list[tuple[str, str]]:
    """Returns (meaning, CSS colour) of the colours of a difference picture."""
    if first is last:
        meanings = {"both": "correct", "neither": "wrong"}
    else:
        meanings = {
            "both": "both correct",
            "later": f"only {last.name} correct",
            "earlier": f"only {first.name} correct",
            "neither": "both wrong",
        }
    return [(text, colour_code(plots.DIFFERENCES[key])) for key, text in meanings.items()]


def _prediction_path(stage: StageReport, name: str) -> epath.Path:
    return stage.folder / artifacts.PREDICTIONS / f"{name}.png"


def select_images(first: StageReport, last: StageReport) -> dict[str, list[str]]:
    """Selects the images of the gallery; returns the reasons by image.

    Args:
        first: the teacher.
        last: the stage whose scores rank the images.
    """
    scores = last.evaluation["miou_by_image"]
    earlier_scores = first.evaluation["miou_by_image"]
    ranked = sorted((scores[n], n) for n in last.evaluation["kept"] if scores[n] is not None)
    names = [name for _, name in ranked]
    middle = max((len(names) - _NUM_RANKED) // 2, 0)
    selected = [("best", name) for name in names[::-1][:_NUM_RANKED]]
    selected += [("median", name) for name in names[middle : middle + _NUM_RANKED]]
    selected += [("worst", name) for name in names[:_NUM_RANKED]]
    if first is not last:
        gains = sorted((scores[n] - (earlier_scores.get(n) or 0.0), n) for n in names)
        largest, smallest = gains[::-1][:_NUM_CHANGED], gains[:_NUM_CHANGED]
        selected += [("largest gain", name) for gain, name in largest if gain > 0]
        selected += [("largest loss", name) for gain, name in smallest if gain < 0]
    reasons: dict[str, list[str]] = {}
    for reason, name in selected:
        reasons.setdefault(name, []).append(reason)
    return reasons


def pseudo_labels(run: Run) -> Section:
    """Builds the section of the newest pseudo-labels: least confident and most changed."""
    for index in range(len(run.stages) - 1, -1, -1):
        stage = run.stages[index]
        selection = artifacts.read_pseudo(stage.folder)
        if selection is None:
            continue
        reasons_by_image: dict[str, list[str]] = {}
        for name, share in selection["least_confident"].items():
            reason = f"mean confidence {100 * share:.0f} %"
            reasons_by_image.setdefault(name, []).append(reason)
        for name, share in selection["most_changed"].items():
            reasons_by_image.setdefault(name, []).append(f"{100 * share:.0f} % changed")
        before = run.stages[index - 1] if index else None
        cards = [
            {
                "name": name,
                "why": ", ".join(reasons),
                "pictures": _pseudo_label_pictures(run, stage, before, name),
            }
            for name, reasons in reasons_by_image.items()
        ]
        return {"missing": "", "stage": stage.name, "cards": cards}
    missing = (
        "No pseudo-labels have been made yet."
        if run.stores_pseudo_labels
        else "This run stores no pseudo-labels."
    )
    return {"missing": missing, "stage": "", "cards": []}


def _pseudo_label_pictures(
    run: Run, stage: StageReport, before: StageReport | None, name: str
) -> list[dict[str, str]]:
    palette = run.palette
    label = stage.folder / PSEUDO_LABELS / f"{name}.png"
    image = stage.folder / artifacts.PSEUDO_GALLERY / f"{name}.jpg"
    pictures = [_picture("image", image, palette)]
    if before is None:
        return [*pictures, _picture(f"by {stage.name}", label, palette)]
    earlier_label = before.folder / PSEUDO_LABELS / f"{name}.png"
    return [
        *pictures,
        _picture(f"by {before.name}", earlier_label, palette),
        _picture(f"by {stage.name}", label, palette),
        _plotted_picture("changed pixels", plots.plot_changes, earlier_label, label),
    ]


def picture(workdir: epath.PathLike) -> bytes:
    """Returns a PNG of evaluation images: image, label, predictions of teacher and last student.

    The images are evenly spaced in the list, not selected by their scores.

    Raises:
        UserError: no stage of the run has finished, or one of its pictures is missing.
    """
    run = read(workdir)
    if not run.scored or run.about is None:
        raise UserError(
            f"{workdir} has no stage that has ended: there is nothing to show yet.",
            code="finished-stage-missing",
        )
    first, last = run.scored[0], run.scored[-1]
    stages = [first] if first is last else [first, last]
    folder = run.workdir / artifacts.GALLERY / last.evaluation["gallery"]
    colours = image_io.full_palette(run.about["palette"])
    names = last.evaluation["kept"]
    rows = []
    for name in names[:: -(-len(names) // _NUM_SHEET_IMAGES)]:
        maps = [folder / f"{name}.png", *(_prediction_path(stage, name) for stage in stages)]
        coloured = [colours[image_io.read_mask(path, _ALL_IDS)] for path in maps]
        rows.append([image_io.read_image(folder / f"{name}.jpg"), *coloured])
    titles = ["image", "label", *(stage.name for stage in stages)]
    classes = zip(run.about["classes"], run.about["palette"], strict=True)
    return plots.contact_sheet(titles, rows, classes)


def _picture(
    title: str, path: epath.Path, palette: Sequence[Sequence[int]], score: str = ""
) -> dict[str, str]:
    """Returns a stored JPEG or a coloured label map for a card; `src` is "" without the file."""
    src = ""
    if path.suffix == ".jpg":
        with contextlib.suppress(OSError):  # missing or not readable
            src = data_uri(path.read_bytes(), "jpeg")
    elif (label_map := _read_label_map(path)) is not None:
        src = data_uri(image_io.encode_mask(label_map, palette), "png")
    return {"title": title, "score": score, "src": src}


def _plotted_picture(title: str, plot: Callable[..., bytes], *paths: epath.Path) -> dict[str, str]:
    """Returns a picture plotted from label maps of one size; `src` is "" if one is missing."""
    maps = [_read_label_map(path) for path in paths]
    shapes = {None if label_map is None else label_map.shape for label_map in maps}
    complete = None not in shapes and len(shapes) == 1
    return {"title": title, "score": "", "src": data_uri(plot(*maps), "png") if complete else ""}


_ALL_IDS = image_io.id_table(image_io.IGNORE)


def _read_label_map(path: epath.Path) -> UInt8[np.ndarray, "h w"] | None:
    """Returns a thumbnail of a stored label map; None if it is missing or damaged."""
    try:
        return artifacts.thumbnail(image_io.read_mask(path, _ALL_IDS))
    except UserError:
        return None
