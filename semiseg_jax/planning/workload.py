"""How many images of which size a config's run will see, from its data or from what is known."""

import collections
import dataclasses
from concurrent import futures
from typing import Any

from etils import epath

from semiseg_jax.data import camvid, cityscapes, labels, pascal_voc, sources, splits, streets
from semiseg_jax.data.downscale import shrunk
from semiseg_jax.data.examples import Example
from semiseg_jax.data.pipeline import padding_for
from semiseg_jax.data.places import data_root
from semiseg_jax.errors import UserError

Size = tuple[int, int]  # height, width in pixels


@dataclasses.dataclass(frozen=True)
class Known:
    """A public data set as published.

    Attributes:
        classes: how many.
        size: of its images; of the largest where they differ.
        train: training images.
        evaluation: images by name of the set.
    """

    classes: int
    size: Size
    train: int
    evaluation: dict[str, int]


KNOWN = {
    "cityscapes": Known(len(cityscapes.CLASSES), (1024, 2048), 2975, {"val": 500}),
    "pascal_voc": Known(len(pascal_voc.CLASSES), (500, 500), 10_582, {"val": 1449, "train": 1464}),
    "camvid": Known(len(camvid.CLASSES), (360, 480), 367, {"val": 101, "test": 233}),
}
TRAIN_EXTRA = 19_997  # of Cityscapes, without the damaged image
VOC_TRAIN = 1464  # of VOC's own train list


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a run is about.

    Attributes:
        classes: how many.
        labeled, unlabeled, evaluated: images of each set.
        label_sizes, evaluation_sizes: how many images are seen at each padded size.
        selection_sizes: likewise of the labelled images held out to choose weights by.
        assumed: sentences on what was not read from the data.
    """

    classes: int
    labeled: int
    unlabeled: int
    evaluated: int
    label_sizes: dict[Size, int]
    evaluation_sizes: dict[Size, int]
    selection_sizes: dict[Size, int] = dataclasses.field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    @property
    def selected(self) -> int:
        """Images that weights are chosen by, beside those that are reported."""
        return sum(self.selection_sizes.values())


def of(config: Any) -> Workload:
    """The workload of a config: of its data where they are, else of the data set as published.

    Raises:
        UserError: the data are not there and not known, or what is there is not as it should be.
    """
    known = _published(config)
    if known is None:
        return _read(config)
    if config.data.name == "streets":
        return _assumed(config, known)  # They are drawn as the config says.
    try:
        data_root(config.data, "")
    except UserError:
        return _assumed(config, known)
    return _read(config)


def _published(config: Any) -> Known | None:
    data = config.data
    if data.name != "streets":
        return KNOWN.get(data.name)
    counts = {"val": data.streets_val, "train": data.streets_train}
    return Known(len(streets.CLASSES), tuple(data.streets_size), data.streets_train, counts)


def _read(config: Any) -> Workload:
    dataset, _ = sources.plan(config)
    factor = config.data.downscale
    return Workload(
        len(dataset.classes),
        len(dataset.labeled),
        len(dataset.unlabeled),
        len(dataset.evaluation),
        _sizes(dataset.unlabeled, config.eval.pad_to, factor),
        _sizes(dataset.evaluation, config.eval.pad_to, factor),
        _sizes(dataset.selection, config.eval.pad_to, factor),
    )


def _sizes(examples: tuple[Example, ...], pad_to: int, factor: int) -> dict[Size, int]:
    """How many images have each size, as labelling and evaluation pad them."""
    pad_to = padding_for(examples, pad_to)
    with futures.ThreadPoolExecutor() as pool:
        found = pool.map(lambda e: labels.image_size(e.image), examples)
        return dict(collections.Counter(_padded(shrunk(size, factor), pad_to) for size in found))


def _padded(size: Size, pad_to: int) -> Size:
    height, width = (-(-side // pad_to) * pad_to for side in size)
    return height, width


def _assumed(config: Any, known: Known) -> Workload:
    data = config.data
    train = known.train
    if data.name == "pascal_voc" and not data.voc_augmented:
        train = VOC_TRAIN
    labeled = _listed(data.labeled_list)
    if labeled is None:
        labeled = splits.number(train, data.labels, "data.labels") if data.labels else train
    unlabeled = _listed(data.unlabeled_list)
    if unlabeled is None:
        unlabeled = train - labeled + (TRAIN_EXTRA if data.train_extra else 0)
    selected = 0
    if config.eval.select == "holdout":
        selected = splits.number(labeled, data.holdout, "data.holdout")
        labeled -= selected
    if data.unlabeled_ratio:
        unlabeled = min(unlabeled, round(data.unlabeled_ratio * labeled))
    evaluated = _listed(data.evaluation_list)
    if evaluated is None:
        evaluated = known.evaluation.get(config.eval.split, 0)
    many = data.name == "pascal_voc"  # whose images have hundreds of sizes
    size = _padded(shrunk(known.size, data.downscale), config.eval.pad_to if many else 1)
    return Workload(
        known.classes,
        labeled,
        unlabeled,
        evaluated,
        {size: unlabeled},
        {size: evaluated},
        {size: selected} if selected else {},
        _sentences(config, many, size),
    )


def _sentences(config: Any, many: bool, size: Size) -> tuple[str, ...]:
    data = config.data
    if data.name == "streets":
        return ()
    height, width = size
    every = "every image taken as" if many else "images of"
    said = [f"The data are not here: counts of {data.name} as published, {every} {width}x{height}."]
    if data.unlabeled_dir:
        said.append(f"The images of data.unlabeled_dir={data.unlabeled_dir} are not counted.")
    return tuple(said)


def _listed(name: str) -> int | None:
    """How many images a list names; None for no list.

    Raises:
        UserError: it lies with the data, which are not there.
    """
    if not name:
        return None
    if name == f"{pascal_voc.LISTS}/train.txt":
        return VOC_TRAIN
    if not epath.Path(name).exists():
        raise UserError(
            f"The list {name} is missing, and the data it may lie with are too: give their place "
            "with --config.data.root=…, or counts with data.labels."
        )
    return len(splits.read_list(epath.Path(name)))
