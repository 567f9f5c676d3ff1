"""The sections of pictures: evaluation images, pseudo-labels; and the picture that stands alone."""

from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from jaxtyping import UInt8

from semiseg_jax import figures, record
from semiseg_jax.data import labels
from semiseg_jax.errors import UserError
from semiseg_jax.pseudo_labels import PSEUDO_LABELS
from semiseg_jax.reporting.markup import Section, colour_code, data_uri, percent
from semiseg_jax.reporting.run import Run, Stage, read

# Images of the gallery that are best, median and worst; and that gained or lost most.
_OF_A_KIND, _OF_A_CHANGE = 2, 1
# Images of the picture that stands alone.
_IN_A_PICTURE = 4


def gallery(run: Run) -> Section:
    """Evaluation images: best, median and worst of the last stage, and what changed most."""
    if not run.scored:
        return {"missing": "No stage has kept its predictions yet.", "cards": []}
    last, first = run.scored[-1], run.scored[0]
    folder = run.workdir / record.GALLERY / last.evaluation["gallery"]
    palette = run.palette
    cards = []
    for name, why in chosen(first, last).items():
        pictures = [
            _picture("image", folder / f"{name}.jpg", palette),
            _picture("truth", folder / f"{name}.png", palette),
        ]
        for stage in run.scored:
            score = percent(stage.evaluation["miou_by_image"].get(name))
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
        "differences": [(w, colour_code(c)) for w, c in zip(words, colours, strict=True) if w],
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
    return {"title": title, "score": "", "src": data_uri(draw(*maps), "png") if complete else ""}


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


def pseudo_labels(run: Run) -> Section:
    """Label maps of the last stage that labelled: least confident, most changed."""
    for place in range(len(run.stages) - 1, -1, -1):
        stage = run.stages[place]
        kept = labels.read_json(stage.folder / f"{record.PSEUDO_GALLERY}.json")
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
    palette = run.palette
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


def _picture(
    title: str, path: epath.Path, palette: Sequence[Sequence[int]], score: str = ""
) -> dict[str, str]:
    """A picture of a card: a JPEG as it is, a label map in its colours; no `src` without a file."""
    picture = {"title": title, "score": score, "src": ""}
    if path.suffix == ".jpg" and path.exists():
        picture["src"] = data_uri(path.read_bytes(), "jpeg")
    elif (classes := _map_of(path)) is not None:
        picture["src"] = data_uri(labels.encode_mask(classes, palette), "png")
    return picture


_ALL_IDS = labels.id_table(labels.IGNORE)


def _map_of(path: epath.Path) -> UInt8[np.ndarray, "h w"] | None:
    """A kept label map, made small; None where it is missing or damaged."""
    try:
        return record.small(labels.read_mask(path, _ALL_IDS))
    except UserError:
        return None
