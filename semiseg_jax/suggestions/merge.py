"""Takes corrected suggestions back: masks, lists and a config for the next run.

    OUTPUT/masks/NAME.png                       the corrected labels, as the data set reads masks
    OUTPUT/labeled.txt, unlabeled.txt           all images, those with new labels moved
    OUTPUT/evaluation.txt                       held-out images, so that they stay the same
    OUTPUT/OUTPUT.py                            the config of the run, with these lists
    OUTPUT/merge.json                           what was taken, and what was not

Nothing that exists is overwritten, and nothing in the folder of the data is changed.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from semiseg_jax.data import load
from semiseg_jax.data.annotations import mask_folder
from semiseg_jax.data.dataset import Dataset
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import model_bundle
from semiseg_jax.suggestions import candidates, corrected, mask_writer, next_config, record

_Labels = UInt8[np.ndarray, "_ _"]


@dataclasses.dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        folder: that was written.
        config: the config of the next run.
        next_workdir: a workdir that does not exist yet.
        weights: of the last model, if a run with the config may start from them.
        taken: the form, out of `corrected.FORMS`, of each label that was taken, by id.
        untouched: ids of labels that nobody changed.
        takes_untouched: whether these were taken too.
        left_out: the reason by id of other labels that were not taken.
        labeled: number of labelled images now.
        notes: sentences.
    """

    folder: Path
    config: Path
    next_workdir: Path
    weights: Path | None
    taken: dict[str, str]
    untouched: list[str]
    takes_untouched: bool
    left_out: dict[str, str]
    labeled: int
    notes: list[str]


def merge(source: str, output: str, workdir: str, take_untouched: bool) -> Merged:
    """Merges the corrected labels of a folder of suggestions.

    Args:
        source: the folder of suggestions.
        output: the folder to create; "" for one beside the folder of the data.
        workdir: of the run; "" for that in suggestions.json.
        take_untouched: take labels that nobody changed too.

    Raises:
        UserError: nothing was corrected, a file is malformed, or the output exists.
    """
    content = record.read(Path(source))
    run = Path(workdir or content["workdir"])
    config = candidates.read_config(epath.Path(run))
    layout = load.read_layout(config)
    if not layout.masks_of_lists:
        raise UserError(
            f"The data source {config.data.name} reads its own masks, whatever masks lists name: "
            "put the corrected ones where it has them, or describe the data as a folder "
            "(data.name=folder).",
            code="merge-source-has-own-masks",
        )
    dataset, _ = load.plan_dataset(config)
    folder = corrected.Folder(
        Path(source), content["images"], tuple(content["classes"]), content["palette"]
    )
    changed = folder.changed()
    untouched = [e["id"] for e in content["images"] if e["id"] not in changed]
    forms = {**(dict.fromkeys(untouched, "mask") if take_untouched else {}), **changed}
    labels, left_out = _read(folder, dataset, forms)
    if not labels:
        others = f" ({next(iter(left_out.values()))})" if left_out else ""
        raise UserError(
            f"None of the {len(content['images'])} labels in {source} was changed since they were "
            f"suggested, or none can be taken{others}: correct some, or take them as they are with "
            "--take_untouched.",
            code="merge-nothing-corrected",
        )
    names = {entry["id"]: entry["name"] for entry in content["images"]}
    count = len(dataset.labeled) + len(dataset.selection) + len(labels)
    target = _choose_folder(output, source, config, count)
    taken = {id_: forms[id_] for id_ in labels}
    with mask_folder.new_folder(target) as new:
        masks = {}
        for id_, label_map in labels.items():
            name = Path("masks", names[id_]).with_suffix(".png")
            mask_writer.write(new / name, label_map, dataset)
            masks[id_] = os.fspath(target / name)
        next_config.write(new, target, config, dataset, masks)
        about = {
            "suggestions": os.path.abspath(source),
            "taken": taken,
            "left_out": left_out,
            "untouched": untouched,
            "untouched_taken": take_untouched,
        }
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        (new / "merge.json").write_text(text, "utf-8")
    return Merged(
        folder=target,
        config=target / mask_folder.config_name(target.name),
        next_workdir=_free(run.parent / f"{run.absolute().name}_{count}_labels"),
        weights=_weights(run, config),
        taken=taken,
        untouched=untouched,
        takes_untouched=take_untouched,
        left_out=left_out,
        labeled=count,
        notes=_notes(folder, dataset, config, len(labels)),
    )


def _read(
    folder: corrected.Folder, dataset: Dataset, forms: Mapping[str, str]
) -> tuple[dict[str, _Labels], dict[str, str]]:
    """Returns the label maps by id, and the reasons of those that are left out."""
    unlabeled = {e.id for e in dataset.unlabeled}
    labels: dict[str, _Labels] = {}
    left_out: dict[str, str] = {}
    for entry in folder.images:
        id_ = entry["id"]
        if id_ not in forms:
            continue
        if id_ not in unlabeled:
            left_out[id_] = "it is no unlabelled image of the run any more"
            continue
        label_map = folder.label_map(entry, forms[id_])
        if (label_map == IGNORE).all():
            left_out[id_] = "no pixel of it has a label"
        else:
            labels[id_] = label_map
    return labels, left_out


def _choose_folder(output: str, source: str, config: Any, count: int) -> Path:
    """Returns a folder that does not exist: the given one, or one beside the data."""
    if output:
        target = Path(os.path.abspath(output))
        mask_folder.check_new(target, Path(source))
        return target
    beside = config.data.root or source
    return _free(Path(os.path.abspath(beside) + f"_{count}_labels"))


def _free(path: Path) -> Path:
    """Returns the path, with a number if it exists."""
    number, free = 2, path
    while os.path.lexists(free):
        free = path.with_name(f"{path.name}_{number}")
        number += 1
    return free


def _weights(run: Path, config: Any) -> Path | None:
    """Returns the weights of the last model; None if it has another backbone than the teacher."""
    if model_bundle.load(run).model_config.backbone != config.model.backbone:
        return None
    return run / model_bundle.FOLDER / model_bundle.WEIGHTS


def _notes(folder: corrected.Folder, dataset: Dataset, config: Any, count: int) -> list[str]:
    notes = [f"{path} is of no suggested image, and is not read." for path in folder.strangers()]
    if len(dataset.unlabeled) == count:
        notes.append(
            "No unlabelled image is left: there is nothing to label for students; train on labels "
            "alone with --config.rounds.count=0."
        )
    if dataset.evaluation_is_held_out and dataset.evaluation:
        notes.append(
            "The images that were held out for evaluation stay the same (evaluation.txt), so that "
            "the scores can be compared."
        )
    if config.eval.select == "holdout":
        notes.append(
            "The images that select the weights are drawn anew from all labelled ones "
            "(eval.select=holdout)."
        )
    return notes
