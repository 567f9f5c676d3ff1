"""True masks of unlabelled images, which judge the labels of experiments and train nothing."""

import dataclasses
import os
from typing import Any

from etils import epath

from semiseg_jax.data import file_content, load
from semiseg_jax.data.data_record import ExampleRecord
from semiseg_jax.data.dataset import Dataset, Example, MaskFinder, files_below, is_image
from semiseg_jax.data.sources.downscale import downscale_dataset
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import logger


def load_truth(config: Any, dataset: Dataset) -> Dataset | None:
    """Returns the unlabelled images that `eval.unlabeled_masks` has masks of, as evaluation images.

    Nothing but the evaluator of stages calls this, so that no code that trains has these masks.

    Args:
        config: the whole config; `data` and `eval.unlabeled_masks` are read.
        dataset: of the run, with its record.

    Returns:
        A data set with an evaluation set alone, downscaled as `dataset` is; None without the key.

    Raises:
        UserError: the folder has no mask of an unlabelled image, a mask has another size than its
            image or unknown values, or a file is damaged.
    """
    if not config.eval.unlabeled_masks:
        return None
    folder = epath.Path(os.path.expanduser(config.eval.unlabeled_masks))
    examples = _examples(folder, config.data.mask_suffix, dataset)
    if not examples:
        unlabeled = dataset.unlabeled_ids
        named = f", such as {unlabeled[0]}{config.data.mask_suffix}" if unlabeled else ""
        raise UserError(
            f"eval.unlabeled_masks={folder} has no mask of an unlabelled image: put masks there "
            f"that are named as these images{named}, or leave the key empty.",
            code="unlabeled-masks-missing",
        )
    logger.info(
        f"{len(examples)} of {len(dataset.unlabeled)} unlabelled images have a mask in {folder}: "
        "the stages are evaluated on them too; they are not trained on."
    )
    layout = load.read_layout(config)
    truth = dataclasses.replace(
        dataset,
        name=layout.name,
        table=layout.table,
        mask_format=layout.mask_format,
        labeled=(),
        unlabeled=(),
        selection=(),
        evaluation=examples,
        evaluated_on="unlabeled",
        record=None,
    )
    cache = file_content.open_cache(config.data.cache_dir, layout.root)
    try:
        contents = load.read_pairs("unlabelled", examples, layout, cache)
    finally:
        cache.save()
    by_set = {"evaluation": contents, "labeled": [], "selection": [], "unlabeled": []}
    truth = dataclasses.replace(truth, record=load.record_contents(truth, truth, by_set))
    if config.data.downscale == 1:
        return truth
    with multihost.main_first("smaller masks of unlabelled images"):
        return downscale_dataset(truth, layout.root, config.data)


def _examples(folder: epath.Path, suffix: str, dataset: Dataset) -> tuple[Example, ...]:
    """The unlabelled images in their own size, with the masks below a folder."""
    assert dataset.record is not None
    masks = [f for f in files_below(folder) if is_image(f.name, suffix)] if folder.is_dir() else []
    mask_of, root = MaskFinder(folder, masks, suffix), epath.Path(dataset.root)
    recorded: dict[str, ExampleRecord] = dict(dataset.record.sets.get("unlabeled", {}))
    return tuple(
        Example(example.id, os.fspath(root / recorded[example.id].image.path), mask)
        for example in dataset.unlabeled
        if (mask := mask_of(example.id))
    )
