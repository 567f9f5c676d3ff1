"""The data sources, and how their images are split and checked."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Int16

from semiseg_jax.data import (
    content_check,
    file_content,
    file_warnings,
    image_header,
    image_io,
    split_lists,
)
from semiseg_jax.data.data_record import (
    TRAINING_SETS,
    DataRecord,
    ExampleRecord,
    FileRecord,
    relative_path,
)
from semiseg_jax.data.dataset import Dataset, Example, Layout, check_name, pairs
from semiseg_jax.data.file_content import FileCache, FileContent
from semiseg_jax.data.listed_images import read_listed
from semiseg_jax.data.sources import camvid, cityscapes, folder, pascal_voc, streets, tfds
from semiseg_jax.data.sources.downscale import downscale_dataset
from semiseg_jax.runtime import hashes, multihost
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
    root = cache_dir(data) / f"streets-{hashes.hash_bytes(key.encode(), 12)}"
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


def load_dataset(config: Any, recorded: DataRecord | None = None) -> Dataset:
    """Returns the data set of a config, split and checked.

    Args:
        config: the whole config; `data`, `eval.split` and `eval.select` are read.
        recorded: the record of an earlier start with the same config. If a file in it is lost, the
            split is that of the record, because a draw from fewer images would be another split.

    Raises:
        UserError: a folder, list or file is missing, a list is empty, a labelled image has no
            mask or a mask of another size, a mask has unknown values, sets overlap, no files
            can be named after an image, or `data.downscale` is left open.
    """
    if config.data.downscale == 0:
        raise UserError(
            "data.downscale is 0, which leaves it to be chosen from the sizes of the images: load "
            "the data with the config that semiseg_jax.data.size_settings.resolve(config) "
            "returns, or give a factor from 1 on.",
            code="downscale-not-chosen",
        )
    layout = read_layout(config)
    if recorded is not None and _is_file_lost(recorded, layout.root):
        dataset = _recorded_split(config, layout, recorded)
    else:
        dataset = _split(config, layout)
    _check_names(dataset)
    cache = file_content.open_cache(config.data.cache_dir, layout.root)
    dataset = check(dataset, layout.root, cache, is_first_start=recorded is None)
    if config.data.downscale == 1:
        return dataset
    with multihost.main_first("smaller images"):
        return downscale_dataset(dataset, layout.root, config.data)


def plan_dataset(config: Any) -> tuple[Dataset, epath.Path]:
    """Returns the data set of a config, split but not checked, and its root folder.

    Raises:
        UserError: a folder or list is missing, the config asks for more images than exist, or no
            files can be named after an image.
    """
    layout = read_layout(config)
    dataset = _split(config, layout)
    _check_names(dataset)
    return dataset, layout.root


def read_layout(config: Any) -> Layout:
    """Returns the files of the data set of a config, before any split.

    Raises:
        UserError: a folder is missing.
    """
    # Before any image is opened: sources that store no files decode images here.
    image_header.set_max_pixels(config.data.max_image_pixels)
    name = config.data.name
    layout_of = tfds.layout if name.startswith(tfds.PREFIX) else LAYOUTS[name]
    with multihost.main_first("data"):
        return layout_of(config)


def _check_names(dataset: Dataset) -> None:
    for examples in (dataset.labeled, dataset.unlabeled, dataset.evaluation, dataset.selection):
        for example in examples:
            check_name(example)


def _is_file_lost(recorded: DataRecord, root: epath.Path) -> bool:
    """Returns whether a file of the record is missing; the same in every process."""
    paths = [
        os.fspath(root / file.path)
        for name, _, example in recorded.examples()
        for file in example.files
        if name != "evaluation"
    ]
    with futures.ThreadPoolExecutor() as pool:
        local = pool.map(file_content.file_state, multihost.local_shard(paths))
        is_lost = any(state is None for state in local)
    return any(multihost.all_gather("files lost", is_lost))


def _recorded_split(config: Any, layout: Layout, recorded: DataRecord) -> Dataset:
    """Returns the split of a record, with its lost files."""

    def examples(name: str) -> tuple[Example, ...]:
        return tuple(
            Example(
                id_,
                os.fspath(layout.root / example.image.path),
                os.fspath(layout.root / example.mask.path) if example.mask else None,
            )
            for id_, example in recorded.sets.get(name, {}).items()
        )

    evaluation = _given_evaluation(config.data, layout)
    return Dataset(
        name=layout.name,
        classes=layout.classes,
        palette=layout.palette,
        table=layout.table,
        mask_format=layout.mask_format,
        labeled=examples("labeled"),
        unlabeled=examples("unlabeled"),
        evaluation=evaluation or examples("holdout"),
        evaluated_on=config.eval.split if evaluation else "holdout",
        evaluation_is_held_out=not evaluation,
        selection=examples("selection"),
    )


def _given_evaluation(data: Any, layout: Layout) -> tuple[Example, ...]:
    """Returns the images of `data.evaluation_list` or of `eval.split`; none without either."""
    if not data.evaluation_list:
        return layout.evaluation
    # For images with the same id, the later one takes precedence: that of the evaluation set.
    return read_listed(data.evaluation_list, layout, (*layout.train, *layout.evaluation))


def _split(config: Any, layout: Layout) -> Dataset:
    """Splits the examples of a layout by lists or by the seeded draw."""
    data = config.data
    evaluation, evaluated_on = _given_evaluation(data, layout), config.eval.split
    is_given = bool(evaluation)
    evaluation_paths: set[str] = set()
    if data.evaluation_list:
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
                "reported, as there are no others: give an evaluation set, or select by the "
                "reported images with eval.select=reported.",
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
            "select the weights of each stage, never trained on (data.holdout)."
        )
    used_paths = {_real_path(e) for e in (*labeled, *held_out)} | evaluation_paths
    unlabeled = _unlabeled(data, layout, used_paths)
    unlabeled = _resolve_both_lists(data.in_both_lists, unlabeled, labeled, held_out)
    if data.unlabeled_ratio:
        unlabeled = _subsample_unlabeled(unlabeled, data, len(labeled))
    return Dataset(
        name=layout.name,
        classes=layout.classes,
        palette=layout.palette,
        table=layout.table,
        mask_format=layout.mask_format,
        labeled=labeled,
        # Masks of unlabelled images are removed here, so that no later code can read them.
        unlabeled=tuple(dataclasses.replace(e, mask=None) for e in unlabeled),
        evaluation=evaluation,
        evaluated_on=evaluated_on,
        evaluation_is_held_out=not is_given,
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
        return read_listed(data.labeled_list, layout, layout.train)
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
        unlabeled = read_listed(data.unlabeled_list, layout, (*layout.train, *layout.further))
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


def _resolve_both_lists(
    choice: str,
    unlabeled: tuple[Example, ...],
    labeled: Sequence[Example],
    held_out: Sequence[Example],
) -> tuple[Example, ...]:
    """Returns the unlabelled images without those that are labelled too, unless these are kept.

    Args:
        choice: `data.in_both_lists`.
        unlabeled: the unlabelled images.
        labeled: the labelled images.
        held_out: images with masks that are never trained on, hence never kept.

    Raises:
        UserError: there are such images, and `choice` refuses them.
    """
    labeled_paths, held_out_paths = ({_real_path(e) for e in s} for s in (labeled, held_out))
    paths = {_real_path(e) for e in unlabeled}
    shared = paths & (labeled_paths | held_out_paths)
    if choice == "refuse" and shared:
        raise UserError(
            f"{min(shared)} is labelled and unlabelled: take it out of one list, or say with "
            "data.in_both_lists=labeled or both what it is.",
            code="image-labeled-and-unlabeled",
        )
    removed = shared if choice == "labeled" else shared & held_out_paths
    if kept := shared - removed:
        logger.info(f"{len(kept)} images are labelled and unlabelled (data.in_both_lists).")
    if removed:
        logger.info(f"{len(removed)} images of data.unlabeled_list are labelled: left out of it.")
    return tuple(e for e in unlabeled if _real_path(e) not in removed)


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
        counts, _ = image_io.count_classes(mask, layout.table, layout.mask_format)
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
    if len(candidates) == 1:
        raise UserError(
            f"{candidates[0].image} is the only image with a mask, and data.holdout="
            f"{data.holdout:g} needs one to train on and another to hold out: add masks, or name "
            "evaluation images in data.evaluation_list.",
            code="holdout-of-one-image",
        )
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


@dataclasses.dataclass(frozen=True)
class PairContent:
    """The content of an image and of its mask; `mask` is None for an unlabelled image."""

    image: FileContent
    mask: FileContent | None


def check(
    dataset: Dataset, root: epath.Path, cache: FileCache, is_first_start: bool = True
) -> Dataset:
    """Checks a data set before training for mistakes that would corrupt an experiment.

    Decodes every file that changed since it was last decoded; each process reads its shard.

    Args:
        dataset: the data set to check.
        root: the folder of the data set.
        cache: the remembered contents of its files.
        is_first_start: refuse missing images, which a list names by mistake. Later they are lost.

    Returns:
        The data set with `pixels`, `labeled_pixels` and `record`, and without the unlabelled images
        that are lost or not decodable (`left_out`).

    Raises:
        UserError: see `load_dataset`.
    """
    _check_disjoint_sets(dataset)
    try:
        contents: dict[str, list[PairContent]] = {
            name: read_pairs(name, getattr(dataset, name), dataset, cache)
            for name in ("labeled", "evaluation", "selection")
        }
        left_out_codes = {"image-undecodable"} if is_first_start else _LEFT_OUT_CODES
        unlabeled = _read_unlabeled(dataset.unlabeled, cache, left_out_codes)
    finally:
        cache.save()  # After an error in one file, the next start does not read the others again.
    readable = [
        (e, c) for e, c in zip(dataset.unlabeled, unlabeled, strict=True) if not isinstance(c, str)
    ]
    contents["unlabeled"] = [PairContent(c, None) for _, c in readable]
    left_out = {
        e.id: c for e, c in zip(dataset.unlabeled, unlabeled, strict=True) if isinstance(c, str)
    }
    checked = dataclasses.replace(
        dataset, unlabeled=tuple(e for e, _ in readable), left_out=left_out, root=os.fspath(root)
    )
    _report_left_out(left_out, len(dataset.unlabeled))
    counts = _check_contents(checked, contents)
    if is_first_start:
        files = (*checked.labeled, *checked.evaluation, *checked.selection, *checked.unlabeled)
        for warning in file_warnings.find(files):
            logger.info(f"Warning: {warning}")
    sizes = [content.size for _, content in readable]
    sizes += [_header_size(e.image) for e in dataset.unlabeled if e.id in left_out]
    return dataclasses.replace(
        checked,
        pixels=int(counts.sum()) + sum(map(math.prod, sizes)),
        labeled_pixels=tuple(counts[: len(dataset.classes)].tolist()),
        record=record_contents(dataset, checked, contents),
    )


def read_pairs(
    name: str, examples: Sequence[Example], masks_as: Dataset | Layout, cache: FileCache
) -> list[PairContent]:
    """Reads images and masks, and checks each pair.

    Args:
        name: of the examples, the same in every process.
        examples: to read.
        masks_as: has the table and the format of the masks.
        cache: of contents.
    """
    with futures.ThreadPoolExecutor() as pool:
        read = functools.partial(
            content_check.check_pair,
            table=masks_as.table,
            cache=cache,
            form=masks_as.mask_format,
        )
        local = [
            [content.to_json() for content in pair]
            for pair in pool.map(read, multihost.local_shard(examples))
        ]
    return [
        PairContent(FileContent.from_json(image), FileContent.from_json(mask))
        for image, mask in multihost.all_gather_shards(f"{name} images read", local)
    ]


# Of these errors of an unlabelled image, it is left out. Others concern all images alike, such as
# too many bits, or can be corrected in place, such as missing permissions.
_LEFT_OUT_CODES = frozenset({"image-missing", "image-undecodable"})


def _read_unlabeled(
    examples: Sequence[Example], cache: FileCache, left_out_codes: Collection[str]
) -> list[FileContent | str]:
    """Reads unlabelled images; returns the error message of those with an error of these codes."""

    def read(example: Example) -> list[Any] | str:
        try:
            return cache.image(example.image).to_json()
        except UserError as error:
            if error.code not in left_out_codes:
                raise
            return str(error)

    with futures.ThreadPoolExecutor() as pool:
        local = list(pool.map(read, multihost.local_shard(examples)))
    return [
        content if isinstance(content, str) else FileContent.from_json(content)
        for content in multihost.all_gather_shards("unlabeled images read", local)
    ]


def _report_left_out(left_out: Mapping[str, str], total: int) -> None:
    for error in list(left_out.values())[:_MAX_NAMED]:
        logger.info(f"Warning: an unlabelled image is left out: {error}")
    if len(left_out) > _MAX_NAMED:
        logger.info(f"Warning: {len(left_out)} of {total} unlabelled images are left out.")


# At most this many images with the same error are named.
_MAX_NAMED = 3


def _header_size(path: str) -> tuple[int, int]:
    """Returns (height, width) of an image that is not decodable; (0, 0) if its header is not."""
    try:
        return image_io.image_size(path)
    except UserError:
        return 0, 0


def _check_contents(
    dataset: Dataset, contents: Mapping[str, Sequence[PairContent]]
) -> Int[np.ndarray, "256"]:
    """Checks the contents of all files together, and logs warnings.

    Returns:
        The number of labelled pixels of each class id and of IGNORE.
    """
    counts, evaluated, selected = (
        _class_counts([c.mask for c in contents[name] if c.mask], dataset.table)
        for name in ("labeled", "evaluation", "selection")
    )
    check_several_classes(counts, dataset.classes)
    if not evaluated[: len(dataset.classes)].any():
        raise UserError(
            "No pixel of the evaluation masks has a class, so that there is no mIoU: check the "
            "masks' values, data.ignore_ids and data.id_map.",
            code="eval-masks-without-class",
        )
    images = {
        name: [
            (e.image, c.image) for e, c in zip(getattr(dataset, name), contents[name], strict=True)
        ]
        for name in contents
    }
    training = (*images["labeled"], *images["selection"], *images["unlabeled"])
    if pair := content_check.images_in_both(training, images["evaluation"]):
        raise UserError(
            f"{pair[0]} is trained on and has the same pixels as {pair[1]} of the evaluation set: "
            "take it out of one.",
            code="eval-image-content-in-training",
        )
    present = set(np.flatnonzero(counts).tolist())
    absent = [name for i, name in enumerate(dataset.classes) if i not in present]
    if absent:
        logger.info(
            f"No labelled pixel of {', '.join(absent)}: the teacher cannot learn what it never saw."
        )
    masks = [
        (e.mask, c.mask)
        for name in ("labeled", "selection", "evaluation")
        for e, c in zip(getattr(dataset, name), contents[name], strict=True)
        if e.mask and c.mask
    ]
    for warning in (
        *content_check.class_warnings(evaluated, dataset.classes, "evaluation", "the mIoU"),
        *content_check.class_warnings(
            selected, dataset.classes, "held-out", "the choice of the weights"
        ),
        *content_check.mask_warnings(masks, dataset.table),
    ):
        logger.info(f"Warning: {warning}")
    return counts


def _class_counts(
    masks: Sequence[FileContent], table: Int16[np.ndarray, "256"]
) -> Int[np.ndarray, "256"]:
    """Returns the number of pixels of each class id and of IGNORE."""
    counts = np.zeros(256, np.int64)
    for mask in masks:
        for value, count in mask.values.items():
            counts[table[value]] += count
    return counts


def record_contents(
    planned: Dataset, checked: Dataset, contents: Mapping[str, Sequence[PairContent]]
) -> DataRecord:
    """Returns the record of a data set.

    Args:
        planned: the data set with the images that are left out.
        checked: the data set without them.
        contents: the contents of its files.
    """
    root = epath.Path(checked.root)

    def file_record(path: str, content: FileContent | None) -> FileRecord:
        hashes = (content.file_hash, content.pixel_hash) if content else ()
        return FileRecord(relative_path(path, root), *hashes)

    def records(name: str) -> Iterator[tuple[str, ExampleRecord]]:
        by_id = {e.id: c for e, c in zip(getattr(checked, name), contents[name], strict=True)}
        for example in getattr(planned, name):
            content = by_id.get(example.id)
            image = file_record(example.image, content.image if content else None)
            mask = None
            if example.mask:
                mask = file_record(example.mask, content.mask if content else None)
            yield example.id, ExampleRecord(image, mask)

    sets = {name: dict(records(name)) for name in TRAINING_SETS if getattr(planned, name)}
    evaluation = dict(records("evaluation"))
    sets["holdout" if planned.evaluated_on == "holdout" else "evaluation"] = evaluation
    return DataRecord(sets, {planned.evaluation_hash: content_hash(evaluation)})


def content_hash(examples: Mapping[str, ExampleRecord]) -> str:
    """Returns a hash of the content of a set of examples, 16 hex digits.

    It is of the bytes of images, so that it does not depend on the decoder, and of the pixels of
    masks, which may be encoded in several ways.
    """
    lines = [
        f"{id_} {e.image.file_hash} {e.mask.pixel_hash if e.mask else ''}"
        for id_, e in sorted(examples.items())
    ]
    return hashes.hash_bytes("\n".join(lines).encode(errors="surrogateescape"))


def verify(dataset: Dataset, cache_folder: str) -> Dataset:
    """Checks that the files of a data set are still those that `check` read.

    Decodes only files whose size, times or inode changed. Each process checks its shard.

    Args:
        dataset: the data set.
        cache_folder: `data.cache_dir`.

    Returns:
        The data set without the unlabelled images that have been lost since (`left_out`).

    Raises:
        UserError: a file was changed, or a labelled image, an evaluation image or a mask is lost.
    """
    if dataset.record is None:
        return dataset
    cache = file_content.open_cache(cache_folder, dataset.root)
    root = epath.Path(dataset.root)

    def verify_example(name: str, id_: str, example: ExampleRecord) -> str:
        """Returns the error message of an unlabelled image that is lost, else ""."""
        for file, read in zip(example.files, (cache.image, cache.mask), strict=False):
            path = os.fspath(root / file.path)
            try:
                content = read(path)
            except UserError as error:
                if name != "unlabeled" or error.code not in _LEFT_OUT_CODES:
                    raise
                return str(error)
            if not file.is_same(FileRecord(path, content.file_hash, content.pixel_hash)):
                raise UserError(
                    f"{path} was changed after the run was started: restore it, or give another "
                    "--workdir; after a change of an evaluation image or mask, start again.",
                    code="file-changed-during-run",
                )
        return ""

    examples = list(dataset.record.examples())
    try:
        with futures.ThreadPoolExecutor() as pool:
            local = list(pool.map(lambda e: verify_example(*e), multihost.local_shard(examples)))
    finally:
        cache.save()
    errors = multihost.all_gather_shards("files verified", local)
    lost = {id_: error for (_, id_, _), error in zip(examples, errors, strict=True) if error}
    lost = {id_: error for id_, error in lost.items() if id_ not in dataset.left_out}
    _report_left_out(lost, len(dataset.unlabeled))
    return dataclasses.replace(
        dataset,
        unlabeled=tuple(e for e in dataset.unlabeled if e.id not in lost),
        left_out={**dataset.left_out, **lost},
    )


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
    only = classes[0]
    remedy = "check the masks' values"
    if image_io.IGNORE in present:
        only += ' and values that mean "no label"'
        remedy += f"; for masks of 0 and 255 add {image_io.BINARY_MASK_FLAGS}"
    raise UserError(
        f"The labelled masks hold no class but {only}: {remedy}.",
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
