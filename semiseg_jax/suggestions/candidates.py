"""The images that may be suggested: unlabelled ones that equal no other image of the run."""

import dataclasses
from collections.abc import Iterable, Mapping
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util
from jaxtyping import Int

from semiseg_jax import workdir
from semiseg_jax.data import file_content, load
from semiseg_jax.data.dataset import Dataset, Example
from semiseg_jax.data.file_content import FileCache
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime import config_files, rules
from semiseg_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The images of a run, as they are now.

    Attributes:
        config: of the run.
        dataset: its split; the images are those of the source, not downscaled.
        unlabeled: the images that may be suggested.
        aside: the reason by id of the unlabelled images that may not.
        labeled_pixels: pixels of each class in the masks of the labelled images.
    """

    config: Any
    dataset: Dataset
    unlabeled: tuple[Example, ...]
    aside: dict[str, str]
    labeled_pixels: Int[np.ndarray, " classes"]


def read_config(folder: epath.Path) -> Any:
    """Returns the config of a workdir; keys that older code did not have are as it behaved.

    Raises:
        UserError: the folder is no workdir, or its config.json is damaged.
    """
    content = workdir.read_fingerprint(folder, "config.json")
    if content is None:
        raise UserError(
            f"{folder} has no config.json of a run: give the --workdir of a run that has ended.",
            code="suggest-workdir-missing",
        )
    config = config_files.default_config()
    known = traverse_util.flatten_dict(config.to_dict(), sep=".")
    recorded = traverse_util.flatten_dict(content, sep=".")
    values = {**workdir.ADDED_KEYS, **{k: rules.to_tuples(v) for k, v in recorded.items()}}
    with config.ignore_type():
        config.update_from_flattened_dict({k: v for k, v in values.items() if k in known})
    return config


def read(folder: epath.Path) -> Candidates:
    """Returns the images of a run that may be suggested.

    Images that were added to the unlabelled ones after the run may be too.

    Raises:
        UserError: the folder is no workdir, its data is missing, or other images are labelled now.
    """
    config = read_config(folder)
    dataset, root = load.plan_dataset(config)
    _check_labeled(folder, dataset)
    cache = file_content.open_cache(config.data.cache_dir, root)
    hashes, unreadable = _pixel_hashes(dataset.unlabeled, cache)
    others: dict[str, str] = {}
    for kind, examples in (
        ("the labelled", dataset.labeled),
        ("the held-out", dataset.selection),
        ("the evaluation", dataset.evaluation),
    ):
        for example in examples:
            others[cache.image(example.image).pixel_hash] = f"{kind} image {example.id}"
    evaluated = _recorded_evaluation(folder)
    aside = dict(unreadable)
    first: dict[str, str] = {}
    for example in dataset.unlabeled:
        if example.id in aside:
            continue
        pixels = hashes[example.id]
        if example.id in evaluated:
            aside[example.id] = "an evaluation image of this run"
        elif pixels in others:
            aside[example.id] = f"the same pixels as {others[pixels]}"
        elif pixels in first:
            aside[example.id] = f"the same pixels as {first[pixels]}"
        first.setdefault(pixels, example.id)
    cache.save()
    unlabeled = tuple(e for e in dataset.unlabeled if e.id not in aside)
    return Candidates(config, dataset, unlabeled, aside, _count_labeled(dataset, cache))


def _check_labeled(folder: epath.Path, dataset: Dataset) -> None:
    record = workdir.read_record(folder)
    if record is None:
        return
    recorded, now = record.ids("labeled"), {e.id for e in dataset.labeled}
    if changed := sorted(recorded ^ now):
        raise UserError(
            f"{changed[0]} was {'labelled' if changed[0] in recorded else 'not labelled'} when "
            f"{folder} was trained, which is not so now: restore the lists and masks, or give the "
            "--workdir of a run with these.",
            code="suggest-labels-changed",
        )


def _recorded_evaluation(folder: epath.Path) -> frozenset[str]:
    """Returns the ids of the images that the run held out."""
    record = workdir.read_record(folder)
    return record.ids("holdout") | record.ids("selection") if record else frozenset()


def _pixel_hashes(
    examples: Iterable[Example], cache: FileCache
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the hash of each readable image by id, and the error of each other one."""

    def read(example: Example) -> tuple[str, str, str]:
        try:
            return example.id, cache.image(example.image).pixel_hash, ""
        except UserError as error:
            return example.id, "", str(error)

    with futures.ThreadPoolExecutor() as pool:
        contents = list(pool.map(read, examples))
    hashes: Mapping[str, str] = {id_: pixels for id_, pixels, error in contents if not error}
    return dict(hashes), {id_: error for id_, _, error in contents if error}


def _count_labeled(dataset: Dataset, cache: FileCache) -> Int[np.ndarray, " classes"]:
    counts = np.zeros(IGNORE + 1, np.int64)
    for example in dataset.labeled:
        assert example.mask is not None
        for value, count in cache.mask(example.mask, dataset.mask_format).values.items():
            counts[dataset.table[value]] += count
    return counts[: len(dataset.classes)]
