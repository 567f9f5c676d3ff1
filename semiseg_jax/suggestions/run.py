"""Suggests images: reads the run, measures its unlabelled images, ranks them, writes the folder."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from semiseg_jax.data.dataset import Example
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import model_bundle
from semiseg_jax.suggestions import (
    candidates,
    diversity,
    faults,
    output,
    ranking,
    record,
    round_labels,
)
from semiseg_jax.suggestions.candidates import Candidates
from semiseg_jax.suggestions.ranking import Pool, Suggestion
from semiseg_jax.suggestions.scoring import Scored, Scorer

# Called with the numbers of images that are measured and of all.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        workdir: of the run.
        output: the folder to write; "" for one in the workdir.
        count: of images.
        by: one of `ranking.RULES`.
        seed: of the rule "random".
        min_area: the fewest pixels of an object in LabelMe and COCO.
    """

    workdir: str
    output: str = ""
    count: int = 20
    by: str = "combined"
    seed: int = 0
    min_area: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was suggested.

    Attributes:
        folder: that was written.
        suggestions: the first one first.
        aside: the reason by id of the unlabelled images that were not considered.
        considered: number of images that were.
        without_labels: classes without a labelled pixel.
        was_changed: the usual folder was there already, so that another was written.
    """

    folder: Path
    suggestions: list[Suggestion]
    aside: dict[str, str]
    considered: int
    without_labels: list[str]
    was_changed: bool


def suggest(request: Request, progress: Progress) -> Outcome:
    """Writes a folder of suggestions.

    Raises:
        UserError: the run has not ended, no image may be suggested, or the output is there already.
        Preempted: the command must stop; nothing was written.
    """
    folder = epath.Path(request.workdir)
    target = output.choose_folder(request.output, request.workdir)
    bundle = model_bundle.load(request.workdir)
    images = candidates.read(folder)
    labeled = images.dataset.labeled
    _check_classes(request.workdir, bundle.classes, images)
    scorer = Scorer(bundle, images.config, (*images.unlabeled, *labeled))
    done = 0

    def count_done(count: int) -> None:
        nonlocal done
        done += count
        progress(done, len(images.unlabeled))

    of_labeled = scorer.labeled(labeled)
    scored, errors = scorer.unlabeled(images.unlabeled, count_done)
    details = {id_: s.detail for id_, s in (*scored.items(), *of_labeled.items())}
    found = faults.find(details)
    aside = {**images.aside, **errors, **{id_: found[id_] for id_ in scored if id_ in found}}
    pool = _pool(folder, images, scored, of_labeled, aside)
    if not pool.ids:
        reason = (
            f", {next(iter(aside))} because it is {next(iter(aside.values()))}" if aside else ""
        )
        raise UserError(
            f"{request.workdir} has no unlabelled image left that could be suggested ("
            f"{len(aside)} set aside{reason}): add images to data.unlabeled_dir or the "
            "unlabelled list.",
            code="suggest-no-candidates",
        )
    suggestions = ranking.suggest(pool, request.count, request.by, request.seed)
    by_id: dict[str, Example] = {e.id: e for e in images.unlabeled}
    without = [
        name
        for name, pixels in zip(bundle.classes, images.labeled_pixels, strict=True)
        if not pixels
    ]
    output.write(
        target,
        suggestions,
        [by_id[s.id] for s in suggestions],
        scorer,
        bundle.classes,
        bundle.palette,
        _about(request, images, aside, pool, without),
        request.min_area,
    )
    usual = Path(os.path.abspath(request.workdir), record.FOLDER)
    was_changed = not request.output and target != usual
    return Outcome(target, suggestions, aside, len(pool.ids), without, was_changed)


def _check_classes(workdir: str, classes: tuple[str, ...], images: Candidates) -> None:
    if len(classes) != len(images.dataset.classes):
        raise UserError(
            f"The model in {workdir} has {len(classes)} classes and its data has "
            f"{len(images.dataset.classes)}: restore model/ or the data of the run.",
            code="suggest-classes-differ",
        )


def _pool(
    workdir: epath.Path,
    images: Candidates,
    scored: dict[str, Scored],
    labeled: dict[str, Scored],
    aside: dict[str, str],
) -> Pool:
    """Returns the images that were not set aside, in the order of the data set."""
    ids = [e.id for e in images.unlabeled if e.id in scored and e.id not in aside]
    changes = round_labels.differences(workdir, images.config, ids)
    measures = []
    for id_ in ids:
        of_image = scored[id_].measures
        assert of_image is not None
        measures.append(of_image)
    vectors = [s.features for s in (*(scored[id_] for id_ in ids), *labeled.values())]
    features = diversity.standardize(np.stack(vectors)) if vectors else np.zeros((0, 1))
    return Pool(
        ids=ids,
        measures=measures,
        rounds=[changes[id_] for id_ in ids],
        features=features[: len(ids)],
        labeled_features=features[len(ids) :],
        labeled_pixels=images.labeled_pixels,
        classes=images.dataset.classes,
    )


def _about(
    request: Request,
    images: Candidates,
    aside: dict[str, str],
    pool: Pool,
    without: list[str],
) -> dict[str, Any]:
    """Returns what suggestions.json says besides its images."""
    return {
        "workdir": os.path.abspath(request.workdir),
        "by": request.by,
        "seed": request.seed,
        "scales": list(images.config.pseudo.scales),
        "mirrored": bool(images.config.pseudo.flip),
        "considered": len(pool.ids),
        "labeled": len(images.dataset.labeled),
        "labeled_pixels": dict(
            zip(images.dataset.classes, images.labeled_pixels.tolist(), strict=True)
        ),
        "classes_without_labels": without,
        "aside": aside,
    }
