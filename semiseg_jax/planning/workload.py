"""Numbers and sizes of a run's images, read from the data or from what was published about them."""

import collections
import dataclasses
from concurrent import futures
from typing import Any

from etils import epath

from semiseg_jax.data import image_io, load, size_settings, split_lists
from semiseg_jax.data.dataset import Dataset, Example
from semiseg_jax.data.sources import camvid, cityscapes, pascal_voc, streets
from semiseg_jax.data.sources.downscale import shrunk
from semiseg_jax.runtime import config_files
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import capture_lines
from semiseg_jax.runtime.paths import data_root
from semiseg_jax.shape_buckets import Size, pad_multiple, pad_size


@dataclasses.dataclass(frozen=True)
class PublishedDataset:
    """Published numbers of a public data set.

    Attributes:
        classes: number of classes.
        size: size of its images; of the largest image if they differ.
        train: number of training images.
        evaluation: number of images by name of the evaluation set.
    """

    classes: int
    size: Size
    train: int
    evaluation: dict[str, int]


PUBLISHED = {
    "cityscapes": PublishedDataset(len(cityscapes.CLASSES), (1024, 2048), 2975, {"val": 500}),
    "pascal_voc": PublishedDataset(
        len(pascal_voc.CLASSES), (500, 500), 10_582, {"val": 1449, "train": 1464}
    ),
    "camvid": PublishedDataset(len(camvid.CLASSES), (360, 480), 367, {"val": 101, "test": 233}),
}
TRAIN_EXTRA = 19_997  # images of Cityscapes train_extra, without the damaged one
VOC_TRAIN = 1464  # images of VOC's own train list


@dataclasses.dataclass(frozen=True)
class Workload:
    """The images that a run processes.

    Attributes:
        classes: number of classes.
        labeled, unlabeled, evaluated: number of images of each set.
        label_sizes, evaluation_sizes: number of images at each padded size.
        selection_sizes: the same for the labelled images held out to select weights.
        assumptions: sentences about numbers that were not read from the data.
    """

    classes: int
    labeled: int
    unlabeled: int
    evaluated: int
    label_sizes: dict[Size, int]
    evaluation_sizes: dict[Size, int]
    selection_sizes: dict[Size, int] = dataclasses.field(default_factory=dict)
    assumptions: tuple[str, ...] = ()

    @property
    def selected(self) -> int:
        """Number of images held out to select weights."""
        return sum(self.selection_sizes.values())


def from_config(config: Any) -> Workload:
    """Returns the workload of a config, from its data if present, else from published numbers.

    Raises:
        UserError: the data are missing and not a published data set, or they are malformed.
    """
    published = _published_instead(config)
    return _read(config) if published is None else _assume(config, published)


def resolve_sizes(config: Any) -> Any:
    """Returns a copy of a config with a value for each setting that depends on the images' sizes.

    Raises:
        UserError: as `from_config`.
    """
    published = _published_instead(config)
    if published is None:
        return size_settings.resolve(config)
    values = size_settings.choose_from_sizes(config, [published.size])
    return size_settings.with_values(config, values)


def _published_instead(config: Any) -> PublishedDataset | None:
    """Returns the published numbers if the data are not here; None if they are to be read."""
    published = _published(config)
    if published is None or config.data.name == "streets":
        return published  # The config determines how many scenes are drawn.
    try:
        data_root(config.data, "")
    except UserError:
        return published
    return None


def _published(config: Any) -> PublishedDataset | None:
    data = config.data
    if data.name != "streets":
        return PUBLISHED.get(data.name)
    counts = {"val": data.streets_val, "train": data.streets_train}
    size = tuple(data.streets_size)
    return PublishedDataset(len(streets.CLASSES), size, data.streets_train, counts)


def _read(config: Any) -> Workload:
    """Returns the workload of data that are present."""
    with capture_lines():  # The plan shows what follows from the data.
        dataset, _ = load.plan_dataset(config)
    return from_dataset(config, dataset, config.data.downscale)


def from_dataset(config: Any, dataset: Dataset, factor: int = 1) -> Workload:
    """Returns the workload of a data set; reads the headers of its images.

    Args:
        config: the whole config.
        dataset: the images.
        factor: by which the run will downscale them; `load.load_dataset` already has.
    """
    return Workload(
        len(dataset.classes),
        len(dataset.labeled),
        len(dataset.unlabeled),
        len(dataset.evaluation),
        _padded_sizes(dataset.unlabeled, config.eval.pad_to, factor),
        _padded_sizes(dataset.evaluation, config.eval.pad_to, factor),
        _padded_sizes(dataset.selection, config.eval.pad_to, factor),
    )


def _padded_sizes(examples: tuple[Example, ...], pad_to: int, factor: int) -> dict[Size, int]:
    """Returns the number of images at each size that labelling and evaluation pad them to."""
    with futures.ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda e: image_io.image_size(e.image), examples))
    multiple = pad_multiple(sizes, pad_to)
    return dict(collections.Counter(pad_size(shrunk(size, factor), multiple) for size in sizes))


def _assume(config: Any, published: PublishedDataset) -> Workload:
    """Returns the workload of data that are not present."""
    data = config.data
    train = published.train
    if data.name == "pascal_voc" and not data.voc_augmented:
        train = VOC_TRAIN
    labeled = _count_listed(data.labeled_list)
    if labeled is None:
        labeled = split_lists.number(train, data.labels, "data.labels") if data.labels else train
    unlabeled = _count_listed(data.unlabeled_list)
    if unlabeled is None:
        unlabeled = train - labeled + (TRAIN_EXTRA if data.train_extra else 0)
    held_out = 0
    if config.eval.select == "holdout":
        held_out = split_lists.number(labeled, data.holdout, "data.holdout")
        labeled -= held_out
    if data.unlabeled_ratio:
        unlabeled = min(unlabeled, round(data.unlabeled_ratio * labeled))
    evaluated = _count_listed(data.evaluation_list)
    if evaluated is None:
        evaluated = published.evaluation.get(config.eval.split, 0)
    # Only images of many sizes are padded; VOC has hundreds of sizes.
    has_many_sizes = data.name == "pascal_voc"
    pad_to = config.eval.pad_to if has_many_sizes else 1
    size = pad_size(shrunk(published.size, data.downscale), pad_to)
    return Workload(
        published.classes,
        labeled,
        unlabeled,
        evaluated,
        {size: unlabeled},
        {size: evaluated},
        {size: held_out} if held_out else {},
        _assumptions(config, has_many_sizes, size),
    )


def _assumptions(config: Any, has_many_sizes: bool, size: Size) -> tuple[str, ...]:
    data = config.data
    if data.name == "streets":
        return ()
    height, width = size
    images = "every image taken as" if has_many_sizes else "images of"
    sentences = [
        f"The data are not here: counts of {data.name} as published, {images} {width}x{height}."
    ]
    if data.unlabeled_dir:
        sentences.append(f"The images of data.unlabeled_dir={data.unlabeled_dir} are not counted.")
    return tuple(sentences)


def _count_listed(name: str) -> int | None:
    """Returns the number of images in a list; None without a list.

    Raises:
        UserError: the list is missing; it may be part of the missing data.
    """
    if not name:
        return None
    if name == f"{pascal_voc.LISTS}/train.txt":
        return VOC_TRAIN
    path = epath.Path(config_files.find_list(name))
    if not path.exists():
        raise UserError(
            f"The list {name} is missing, and the data it may lie with are too: give their place "
            "with --config.data.root=…, or counts with data.labels.",
            code="listed-data-missing",
        )
    return len(split_lists.read_list(path))
