"""The lists and the config of the run that follows a merge."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util

from semiseg_jax.data.annotations import mask_folder
from semiseg_jax.data.dataset import Dataset, Example
from semiseg_jax.runtime import config_files

_CONFIG = '''"""The run before with more labels: its config, and the lists beside this file."""

from configs import default

VALUES = {{
{values}
}}


def get_config():
    config = default.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(VALUES)
    return config
'''
# Keys whose paths are relative to the working folder, which may be another one next time.
_WORKING_FOLDER_KEYS = (
    *("data.root", "data.cache_dir", "model.pretrained", "rounds.student_pretrained"),
    *("eval.unlabeled_masks", "data.evaluation_list"),
)


def write(
    folder: Path, target: Path, config: Any, dataset: Dataset, masks: Mapping[str, str]
) -> None:
    """Writes the lists and the config.

    Args:
        folder: where they are written.
        target: the path that this folder will have.
        config: of the run before.
        dataset: its images.
        masks: the paths of the new masks, by id of the image.
    """
    # Images that select weights are drawn from the labelled ones, hence belong to the list.
    old = [(e.image, e.mask) for e in (*dataset.labeled, *dataset.selection)]
    new = [(e.image, masks[e.id]) for e in dataset.unlabeled if e.id in masks]
    rest = [e for e in dataset.unlabeled if e.id not in masks]
    _write_list(folder / "labeled.txt", [*old, *new])
    changes = {
        "data.labeled_list": os.fspath(target / "labeled.txt"),
        "data.unlabeled_list": "",
        "data.unlabeled_dir": "",
        "data.unlabeled_ratio": 0.0,
        # A teacher of fewer labels.
        "rounds.teacher_from": "",
    }
    if rest:
        _write_list(folder / "unlabeled.txt", ((e.image, None) for e in rest))
        changes["data.unlabeled_list"] = os.fspath(target / "unlabeled.txt")
    if dataset.evaluation_is_held_out and dataset.evaluation:
        _write_list(folder / "evaluation.txt", map(_pair, dataset.evaluation))
        changes["data.evaluation_list"] = os.fspath(target / "evaluation.txt")
    values = {**_changed_values(config), **changes}
    lines = "\n".join(f"    {key!r}: {value!r}," for key, value in values.items())
    path = folder / mask_folder.config_name(target.name)
    path.write_text(_CONFIG.format(values=lines), "utf-8")


def _pair(example: Example) -> tuple[str, str | None]:
    return example.image, example.mask


def _write_list(path: Path, pairs: Iterable[tuple[str, str | None]]) -> None:
    """Writes absolute paths; the TAB says where a name ends that contains blanks."""
    lines = (
        f"{os.path.abspath(image)}\t{os.path.abspath(mask) if mask else None}\n"
        for image, mask in pairs
    )
    path.write_text("".join(lines), "utf-8")


def _changed_values(config: Any) -> dict[str, Any]:
    """Returns the values by key that differ from configs/default.py, with absolute paths."""
    default = traverse_util.flatten_dict(config_files.default_config().to_dict(), sep=".")
    values = traverse_util.flatten_dict(config.to_dict(), sep=".")
    for key in _WORKING_FOLDER_KEYS:
        value = values[key]
        # A list below data.root, or the name of weights, is found from any folder.
        is_below_root = key.endswith("_list") and os.path.exists(
            os.path.join(values["data.root"], value)
        )
        if value and os.path.exists(value) and not is_below_root:
            values[key] = os.path.abspath(value)
    return {key: value for key, value in values.items() if value != default[key]}
