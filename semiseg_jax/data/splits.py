"""Checks split lists or the data of a config for mistakes that would corrupt an experiment.

    python -m semiseg_jax.data.splits --labeled=F --unlabeled=F --val=F [--root=DIR]
    python -m semiseg_jax.data.splits --config=configs/cityscapes.py [--config.key=value …]

The first command checks lists and, with --root, the files that they name. The second checks the
data of a config, split as the config says. The exit status is 1 if an error was found.
"""

import collections
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import app, flags
from etils import epath
from jaxtyping import Int, Int16
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from semiseg_jax.data import (
    content_check,
    file_content,
    file_warnings,
    image_header,
    image_io,
    split_lists,
)
from semiseg_jax.data.dataset import (
    IMAGE_SUFFIXES,
    Example,
    files_below,
    is_image,
    normal_name,
)
from semiseg_jax.data.file_content import FileCache, FileContent
from semiseg_jax.data.mask_format import VALUES, MaskFormat
from semiseg_jax.data.split_lists import Entry
from semiseg_jax.runtime import cli, config_files, hashes
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import capture_lines

LIST_NAMES = ("labeled", "unlabeled", "val")
# Name of the labelled images that a config holds out to choose weights by (eval.select=holdout).
SELECTION = "held out"
# An error message names at most this many images.
MAX_NAMED = 3

# Published lists of labelled images, by their `fingerprint`.
KNOWN_LISTS = {
    "0ba33a845572f337": "CamVid 1/30 (configs/splits/camvid/1_30.txt)",
    "681eaa635a1cd2f1": "CamVid 1/16 (configs/splits/camvid/1_16.txt)",
    "9b46c9ed7a4bc791": "CamVid 1/8 (configs/splits/camvid/1_8.txt)",
    "d2dcce5ff0fd2503": "CamVid 1/4 (configs/splits/camvid/1_4.txt)",
    "78b93b048a3a2371": "CamVid 1/2 (configs/splits/camvid/1_2.txt)",
}
# Common splits by their numbers of (labelled, unlabelled) images; equal sizes prove nothing.
KNOWN_SIZES = {
    (100, 2875): "Cityscapes 1/30",
    (186, 2789): "Cityscapes 1/16",
    (372, 2603): "Cityscapes 1/8",
    (744, 2231): "Cityscapes 1/4",
    (1488, 1487): "Cityscapes 1/2",
    (92, 10490): "Pascal VOC, 92 of the original 1,464 labelled, the rest of 10,582 unlabelled",
    (183, 10399): "Pascal VOC, 183 of the original 1,464 labelled, the rest of 10,582 unlabelled",
    (366, 10216): "Pascal VOC, 366 of the original 1,464 labelled, the rest of 10,582 unlabelled",
    (732, 9850): "Pascal VOC, 732 of the original 1,464 labelled, the rest of 10,582 unlabelled",
    (1464, 9118): "Pascal VOC, the original 1,464 labelled, the rest of 10,582 unlabelled",
    (100, 10482): "Pascal VOC 1/106 of 10,582",
    (212, 10370): "Pascal VOC 1/50 of 10,582",
    (529, 10053): "Pascal VOC 1/20 of 10,582",
    (662, 9920): "Pascal VOC 1/16 of 10,582",
    (1323, 9259): "Pascal VOC 1/8 of 10,582",
    (2646, 7936): "Pascal VOC 1/4 of 10,582",
    (5291, 5291): "Pascal VOC 1/2 of 10,582",
}


@dataclasses.dataclass
class SplitReport:
    """The findings about a split.

    Attributes:
        sizes: number of entries of each readable list.
        masks: number of these entries that name a mask.
        errors: sentences about mistakes that would corrupt an experiment.
        warnings: sentences about properties that may be intended.
        notes: sentences with further information.
        classes: pixel counts by class id or mask value, of the labelled and of the val masks.
        names: class names in id order; empty if unknown.
        images: (path, content) of the readable images of each set.
        checked_masks: (path, content) of the readable masks of all sets.
    """

    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    masks: dict[str, int] = dataclasses.field(default_factory=dict)
    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    classes: dict[str, Int[np.ndarray, "256"]] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()
    images: dict[str, list[content_check.File]] = dataclasses.field(default_factory=dict)
    checked_masks: list[content_check.File] = dataclasses.field(default_factory=list)


def examine_lists(paths: dict[str, str], root: str = "") -> SplitReport:
    """Checks split lists and, with `root`, the files that they name.

    Args:
        paths: paths of the lists by name, out of LIST_NAMES; "" for a list that was not given.
        root: the folder that the paths in the lists are relative to; "" to check no files.
    """
    report = SplitReport()
    entries: dict[str, tuple[Entry, ...]] = {}
    for name, path in paths.items():
        if not path:
            report.notes.append(f"No list of {name} images was given: none are checked.")
            continue
        path = config_files.find_list(path)
        try:
            entries[name] = split_lists.read_list(path)
        except UserError as error:
            report.errors.append(str(error))
            continue
        _check_encoding(path, report)
        report.sizes[name] = len(entries[name])
        report.masks[name] = sum(e.mask is not None for e in entries[name])
    _check_duplicates(entries, report)
    if "labeled" in entries:
        _identify_split(entries, report)
        unmasked = [e.image for e in entries["labeled"] if e.without_mask]
        if unmasked:
            report.errors.append(f"{_abbreviate(unmasked)} labelled without a mask: name its mask.")
    if root:
        _check_files(entries, epath.Path(root).expanduser(), report)
    return report


def _check_encoding(path: str, report: SplitReport) -> None:
    """Adds warnings about CR line ends and a byte order mark."""
    content = epath.Path(path).read_bytes()
    if b"\r" in content:
        report.warnings.append(f"{path} has CR line ends: we read them, other tools may not.")
    if content.startswith(b"\xef\xbb\xbf"):
        report.warnings.append(
            f"{path} begins with a byte order mark: we read it, other tools may not."
        )


def _check_duplicates(entries: dict[str, tuple[Entry, ...]], report: SplitReport) -> None:
    """Adds errors for images that occur twice in a list or in two lists."""
    for name, list_entries in entries.items():
        repeated = list(_common_images(list_entries, list_entries))
        if repeated:
            report.errors.append(f"The {name} list has {_abbreviate(repeated)} more than once.")
    for first, second, harm in (
        ("labeled", "unlabeled", "its label would be known"),
        ("labeled", "val", "the score would be that of images trained on"),
        ("unlabeled", "val", "the score would be that of images trained on"),
    ):
        shared = list(_common_images(entries.get(first, ()), entries.get(second, ())))
        if shared:
            report.errors.append(
                f"{_abbreviate(shared)} in the {first} and in the {second} list: {harm}."
            )


def _common_images(first: Sequence[Entry], second: Sequence[Entry]) -> Iterator[str]:
    """Yields the images of `first` that `second` names too.

    If both are the same list, yields the images that an earlier entry names. Two paths name the
    same image if one ends with the other, so that bare ids and paths below other folders are
    recognised; suffixes such as .jpg are ignored.
    """
    paths_by_id: dict[str, list[str]] = collections.defaultdict(list)
    if first is not second:
        for entry in second:
            paths_by_id[image_id(entry.image)].append(_without_image_suffix(entry.image))
    for entry in first:
        path = _without_image_suffix(entry.image)
        for candidate in paths_by_id[image_id(entry.image)]:
            short, long = sorted((path, candidate), key=len)
            if f"/{long}".endswith(f"/{short}"):
                yield entry.image
                break
        if first is second:
            paths_by_id[image_id(entry.image)].append(path)


def _without_image_suffix(path: str) -> str:
    """Returns the path without an image suffix and without the suffix of Cityscapes' images."""
    stem, suffix = os.path.splitext(normal_name(path))
    stem = stem if suffix.lower() in IMAGE_SUFFIXES else f"{stem}{suffix}"
    return stem.removesuffix("_leftImg8bit")


def image_id(path: str) -> str:
    """Returns the id of an image, the same for all list formats, such as 2007_000032."""
    return os.path.basename(_without_image_suffix(path))


def fingerprint(images: Iterable[str]) -> str:
    """Returns a hash of 16 hex digits of the ids in a list, independent of its format and order."""
    ids = sorted({image_id(image) for image in images})
    return hashes.hash_bytes("\n".join(ids).encode())


def _identify_split(entries: dict[str, tuple[Entry, ...]], report: SplitReport) -> None:
    """Adds a note that names the published split, by its images or else by its sizes."""
    digest = fingerprint(e.image for e in entries["labeled"])
    sizes = (len(entries["labeled"]), len(entries.get("unlabeled", ())))
    if digest in KNOWN_LISTS:
        report.notes.append(f"The labelled images are those of {KNOWN_LISTS[digest]} ({digest}).")
    elif sizes in KNOWN_SIZES:
        report.notes.append(
            f"{KNOWN_SIZES[sizes]} has these sizes; the images may be others ({digest} is not "
            "known)."
        )
    else:
        report.notes.append(f"The labelled images are of no split known here ({digest}).")


def _check_files(
    entries: dict[str, tuple[Entry, ...]], root: epath.Path, report: SplitReport
) -> None:
    """Adds errors for missing files and for masks of the wrong size; counts the mask values."""
    if not root.is_dir():
        report.errors.append(f"The data folder {root} is missing: correct --root.")
        return
    find = _ImageFinder(root)
    cache = file_content.open_cache("", root)
    table = np.arange(256, dtype=np.int16)
    for name, list_entries in entries.items():
        images = [find(entry) for entry in list_entries]
        missing = [e.image for e, i in zip(list_entries, images, strict=True) if i is None]
        if missing:
            report.errors.append(
                f"The {name} list names {_abbreviate(missing)}, missing below {root}: correct the "
                "list or --root."
            )
        # The masks of unlabelled images are never read.
        masks = {
            e.image: split_lists.locate(root, e.mask, e.absolute_mask)
            for e in list_entries
            if e.mask and name != "unlabeled"
        }
        missing_masks = [os.fspath(mask) for mask in masks.values() if not mask.exists()]
        if missing_masks:
            report.errors.append(
                f"The {name} list names the mask {_abbreviate(missing_masks)}, missing: correct "
                "the list or --root."
            )
        existing = []
        for entry, image in zip(list_entries, images, strict=True):
            mask = masks.get(entry.image)
            if image is not None and (mask is None or mask.exists()):
                path = os.fspath(image)
                existing.append(Example(path, path, None if mask is None else os.fspath(mask)))
        _read_files(name, existing, table, cache, report)
        report.warnings += file_warnings.find(existing)
    cache.save()
    _check_contents(table, report)


class _ImageFinder:
    """Finds an image by its path, or by its bare id anywhere below a root."""

    def __init__(self, root: epath.Path):
        self._root = root
        self._by_id: dict[str, epath.Path] | None = None

    def __call__(self, entry: Entry) -> epath.Path | None:
        image = entry.image
        located = split_lists.locate(self._root, image, entry.absolute_image)
        if located.is_file():
            return located
        if "/" in image:
            return None
        if self._by_id is None:
            files = (f for f in files_below(self._root) if is_image(f.name))
            self._by_id = {image_id(f.name): f for f in files}
        return self._by_id.get(image_id(image))


def _read_files(
    name: str,
    examples: Sequence[Example],
    table: Int16[np.ndarray, "256"],
    cache: FileCache,
    report: SplitReport,
    form: MaskFormat = VALUES,
) -> None:
    """Decodes the files of a set; adds their contents, pixel counts and errors to the report."""

    def read(example: Example) -> tuple[FileContent, FileContent | None] | UserError:
        """Returns the contents of the image and the mask, or the error that a run would raise."""
        try:
            if example.mask is None:
                return cache.image(example.image), None
            return content_check.check_pair(example, table, cache, form)
        except UserError as error:
            return error

    total = np.zeros(256, np.int64)
    images = report.images.setdefault(name, [])
    errors: list[str] = []
    with futures.ThreadPoolExecutor() as pool:
        for example, result in zip(examples, pool.map(read, examples), strict=True):
            if isinstance(result, UserError):
                if name == "unlabeled" and result.code == "image-undecodable":
                    report.warnings.append(f"An unlabelled image is left out: {result}")
                else:
                    errors.append(str(result))
                continue
            image, mask = result
            images.append((example.image, image))
            if mask is not None and example.mask is not None:
                report.checked_masks.append((example.mask, mask))
                for value, count in mask.values.items():
                    total[table[value]] += count
    if any(example.mask for example in examples):
        report.classes[name] = total
    report.errors += errors[:MAX_NAMED]
    if len(errors) > MAX_NAMED:
        report.errors.append(
            f"{len(errors) - MAX_NAMED} further {name} images or their masks have such errors."
        )


def _check_contents(table: Int16[np.ndarray, "256"], report: SplitReport) -> None:
    """Adds the errors and warnings that only several files together show."""
    for name in ("labeled", SELECTION, "unlabeled"):
        training, evaluation = report.images.get(name, ()), report.images.get("val", ())
        if pair := content_check.images_in_both(training, evaluation):
            report.errors.append(
                f"{pair[0]} is {name} and has the same pixels as {pair[1]} of the evaluation set: "
                "the score would be that of images trained on."
            )
    _check_learnt_classes(report)
    for name, kind, effect in (
        ("val", "evaluation", "the mIoU"),
        (SELECTION, "held-out", "the choice of the weights"),
    ):
        if name in report.classes and report.names:
            report.warnings += content_check.class_warnings(
                report.classes[name], report.names, kind, effect
            )
    report.warnings += content_check.mask_warnings(report.checked_masks, table)


def _check_learnt_classes(report: SplitReport) -> None:
    """Adds a warning for classes that are evaluated but have no labelled pixel."""
    learnt = report.classes.get("labeled")
    if learnt is None:
        return
    if report.names:
        ids = list(range(len(report.names)))
    else:
        evaluated = report.classes.get("val", learnt)
        ids = [i for i in range(image_io.IGNORE) if learnt[i] or evaluated[i]]
    absent = [_class_name(i, report) for i in ids if not learnt[i]]
    if absent:
        report.warnings.append(f"No labelled pixel of {', '.join(absent)}.")


def _class_name(class_id: int, report: SplitReport) -> str:
    return report.names[class_id] if report.names else f"value {class_id}"


def examine_config(config: Any) -> SplitReport:
    """Checks the data of a config, split as the config says."""
    # Imported here, because the check of lists needs no data source.
    from semiseg_jax.data import load, size_settings

    report = SplitReport()
    try:
        with capture_lines() as lines:
            dataset, root = load.plan_dataset(config)
            if size_settings.is_open(config):
                size_settings.choose(config)
        report.notes.extend(lines)
    except UserError as error:
        report.errors.append(str(error))
        return report
    report.names = dataset.classes
    sets = dict(
        zip(LIST_NAMES, (dataset.labeled, dataset.unlabeled, dataset.evaluation), strict=True)
    )
    if dataset.selection:
        sets[SELECTION] = dataset.selection
    for name, examples in sets.items():
        report.sizes[name] = len(examples)
        report.masks[name] = sum(e.mask is not None for e in examples)
        if not examples:
            report.errors.append(f"There is no {name} image.")
    by_path = {
        name: tuple(Entry(os.path.realpath(e.image), e.mask) for e in examples)
        for name, examples in sets.items()
    }
    _check_duplicates(by_path, report)
    by_id = {name: tuple(Entry(e.id, None) for e in examples) for name, examples in sets.items()}
    _identify_split(by_id, report)
    cache = file_content.open_cache(config.data.cache_dir, root)
    for name in [name for name in sets if name != "unlabeled"]:
        unmasked = [e.image for e in sets[name] if e.mask is None]
        if unmasked:
            report.errors.append(f"{_abbreviate(unmasked)} in the {name} set without a mask.")
        masked = [e for e in sets[name] if e.mask]
        _read_files(name, masked, dataset.table, cache, report, dataset.mask_format)
    files = (*dataset.labeled, *dataset.evaluation, *dataset.selection, *dataset.unlabeled)
    report.warnings += file_warnings.find(files)
    missing = [e.image for e in dataset.unlabeled if not os.path.exists(e.image)]
    if missing:
        report.errors.append(f"The unlabeled set has {_abbreviate(missing)}, missing: restore it.")
    existing = [e for e in dataset.unlabeled if os.path.exists(e.image)]
    _read_files("unlabeled", existing, dataset.table, cache, report)
    cache.save()
    _check_contents(dataset.table, report)
    learnt = report.classes.get("labeled")
    if learnt is not None and learnt.any():
        try:
            load.check_several_classes(learnt, dataset.classes)
        except UserError as error:
            report.errors.append(str(error))
    report.notes.append(f"The split's hash is {dataset.split_hash}, as in result rows.")
    return report


def _abbreviate(names: Sequence[str]) -> str:
    """Joins the first MAX_NAMED names and appends the number of further names."""
    listing = ", ".join(names[:MAX_NAMED])
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{listing}{more}"


def print_report(report: SplitReport, console: Console) -> None:
    """Prints the report as tables and sentences."""
    table = Table(box=box.SIMPLE_HEAD, title="Lists")
    for column in ("", "images", "with a mask"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, size in report.sizes.items():
        table.add_row(name, str(size), str(report.masks[name]))
    if report.sizes:
        console.print(table)
    if report.classes:
        _print_classes(report, console)
    for title, sentences in (
        ("Error", report.errors),
        ("Warning", report.warnings),
        ("Note", report.notes),
    ):
        for sentence in sentences:
            console.print(f"{title}: {sentence}", markup=False)
    if not report.errors:
        console.print("Nothing was found that would corrupt an experiment.")


def _print_classes(report: SplitReport, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="Share of labelled pixels, in %")
    table.add_column("", no_wrap=True)
    for name in report.classes:
        table.add_column(name, justify="right", no_wrap=True)
    totals = {
        name: max(counts[: image_io.IGNORE].sum(), 1) for name, counts in report.classes.items()
    }
    num_classes = len(report.names) or image_io.IGNORE
    for i in range(num_classes):
        if report.names or any(counts[i] for counts in report.classes.values()):
            shares = (f"{100 * c[i] / totals[n]:.2f}" for n, c in report.classes.items())
            table.add_row(escape(_class_name(i, report)), *shares)
    console.print(table)


def run() -> None:
    """Defines the flags and starts the command."""
    # The flags are defined in a function, because another command with its own --config may
    # import this module.
    kinds = ("labelled", "unlabelled", "evaluation")
    holders = [
        *(
            cli.define_path_flag(name, "", f"The list of {kind} images, a line each.")
            for name, kind in zip(LIST_NAMES, kinds, strict=True)
        ),
        cli.define_path_flag("root", "", "The folder that the lists' paths are relative to."),
        flags.DEFINE_integer(
            "max_image_pixels",
            image_header.DEFAULT_MAX_PIXELS,
            "Largest number of pixels of an image, with lists.",
            lower_bound=1,
        ),
    ]
    # --help lists the flags of the module that was started.
    for holder in holders:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])
    cli.define_config_flag("Whose data to look at, instead of at lists")
    app.run(main, flags_parser=cli.parse_flags_and_config)


def main(argv: list[str]) -> None:
    """Prints the report; the exit status is 1 if it has an error."""
    values = flags.FLAGS
    cli.start_command(argv)
    paths = {name: values[name].value or "" for name in LIST_NAMES}
    if values.config is not None:
        # Imported here, because `config_check` is in a higher layer; only the command needs it.
        from semiseg_jax import config_check

        try:
            config_check.check(values.config)
        except UserError as error:
            sys.exit(f"Error: {error}")
        report = examine_config(values.config)
    elif any(paths.values()):
        image_header.set_max_pixels(values.max_image_pixels)
        report = examine_lists(paths, values.root)
    else:
        sys.exit("Error: Nothing to check: give --labeled=F --unlabeled=F --val=F, or --config=….")
    print_report(report, Console(highlight=False, soft_wrap=True))
    if report.errors:
        sys.exit(1)


if __name__ == "__main__":
    run()
