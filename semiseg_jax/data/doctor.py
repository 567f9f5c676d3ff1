"""Looks at split lists for what would corrupt an experiment, before one is run on them.

    python -m semiseg_jax.data.splits --labeled=F --unlabeled=F --val=F [--root=DIR]
    python -m semiseg_jax.data.splits --config=configs/cityscapes.py [--config.key=value …]

The first looks at lists; with the data's folder also at the files that they name. The second
looks at the data of a config, however it is split. Exit status 1 where an error was found.
"""

import collections
import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import app, flags
from etils import epath
from jaxtyping import Int
from rich import box
from rich.console import Console
from rich.table import Table

from semiseg_jax import command_line
from semiseg_jax.data import labels, splits
from semiseg_jax.data.examples import IMAGE_SUFFIXES, Example, files_below
from semiseg_jax.data.splits import Entry
from semiseg_jax.errors import UserError

NAMES = ("labeled", "unlabeled", "val")
# Examples of a finding that are named.
SHOWN = 3

# `fingerprint` of lists of labelled images that are known.
FAMILIES = {
    "0ba33a845572f337": "CamVid 1/30 (configs/splits/camvid/1_30.txt)",
    "681eaa635a1cd2f1": "CamVid 1/16 (configs/splits/camvid/1_16.txt)",
    "9b46c9ed7a4bc791": "CamVid 1/8 (configs/splits/camvid/1_8.txt)",
    "d2dcce5ff0fd2503": "CamVid 1/4 (configs/splits/camvid/1_4.txt)",
    "78b93b048a3a2371": "CamVid 1/2 (configs/splits/camvid/1_2.txt)",
}
# (labelled, unlabelled) images of splits that are much used; the sizes alone prove nothing.
SIZES = {
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
class Report:
    """What was found.

    Attributes:
        sizes: entries of each list that could be read.
        masks: those of them that come with a mask; None where a list of bare ids does not say.
        errors: sentences on what would corrupt an experiment.
        warnings: sentences on what may be meant as it is.
        notes: what else there is to know.
        classes: pixels by class id or mask value, of the labelled and of the val masks.
        names: class names in id order, where they are known.
    """

    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    masks: dict[str, int] = dataclasses.field(default_factory=dict)
    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    classes: dict[str, Int[np.ndarray, "256"]] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()


def examine_lists(paths: dict[str, str], root: str = "") -> Report:
    """Looks at lists alone, or with `root` also at the files they name.

    Args:
        paths: of the lists, by name out of NAMES; those that are "" are left out.
        root: the folder that the lists' paths are relative to; "" for none.
    """
    report = Report()
    entries: dict[str, tuple[Entry, ...]] = {}
    for name, path in paths.items():
        if not path:
            report.notes.append(f"No list of {name} images was given: nothing was said of them.")
            continue
        try:
            entries[name] = splits.read_list(path)
        except UserError as error:
            report.errors.append(str(error))
            continue
        _look_at_bytes(path, report)
        report.sizes[name] = len(entries[name])
        report.masks[name] = sum(e.mask is not None for e in entries[name])
    _look_for_repeats(entries, report)
    if "labeled" in entries:
        _name_family(entries, report)
        without = [e.image for e in entries["labeled"] if e.without_mask]
        if without:
            report.errors.append(f"{_some(without)} labelled without a mask: name its mask.")
    if root:
        _look_at_files(entries, epath.Path(root).expanduser(), report)
    return report


def _look_at_bytes(path: str, report: Report) -> None:
    content = epath.Path(path).read_bytes()
    if b"\r" in content:
        report.warnings.append(f"{path} has CR line ends: we read them, other tools may not.")
    if content.startswith(b"\xef\xbb\xbf"):
        report.warnings.append(
            f"{path} begins with a byte order mark: we read it, other tools may not."
        )


def _look_for_repeats(entries: dict[str, tuple[Entry, ...]], report: Report) -> None:
    """Images that a list has twice, or that two lists have."""
    for name, part in entries.items():
        repeated = [one for one, _ in _same(part, part)]
        if repeated:
            report.errors.append(f"The {name} list has {_some(repeated)} more than once.")
    for one, other, harm in (
        ("labeled", "unlabeled", "its label would be known"),
        ("labeled", "val", "the score would be that of images trained on"),
        ("unlabeled", "val", "the score would be that of images trained on"),
    ):
        both = [a for a, _ in _same(entries.get(one, ()), entries.get(other, ()))]
        if both:
            report.errors.append(f"{_some(both)} in the {one} and in the {other} list: {harm}.")


def _same(one: Sequence[Entry], other: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    """Pairs of entries that name one image; with one list twice, an entry and an earlier one.

    A path and a shorter one that it ends with name the same image, so that bare ids and paths
    below other folders are recognised; endings such as .jpg do not count.
    """
    known: dict[str, list[str]] = collections.defaultdict(list)
    if one is not other:
        for entry in other:
            known[image_id(entry.image)].append(_bare(entry.image))
    for entry in one:
        path = _bare(entry.image)
        for candidate in known[image_id(entry.image)]:
            short, long = sorted((path, candidate), key=len)
            if f"/{long}".endswith(f"/{short}"):
                yield entry.image, candidate
                break
        if one is other:
            known[image_id(entry.image)].append(path)


def _bare(path: str) -> str:
    """The path without an image's ending, and without what Cityscapes' images are named by."""
    stem, suffix = os.path.splitext(path)
    stem = stem if suffix.lower() in IMAGE_SUFFIXES else path
    return stem.removesuffix("_leftImg8bit")


def image_id(path: str) -> str:
    """The id that lists of all kinds agree on: 2007_000032, aachen_000000_000019_…"""
    return os.path.basename(_bare(path))


def fingerprint(images: Iterable[str]) -> str:
    """16 hex digits of the sorted ids of a list, whatever its format."""
    ids = sorted({image_id(image) for image in images})
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def _name_family(entries: dict[str, tuple[Entry, ...]], report: Report) -> None:
    found = fingerprint(e.image for e in entries["labeled"])
    sizes = (len(entries["labeled"]), len(entries.get("unlabeled", ())))
    if found in FAMILIES:
        report.notes.append(f"The labelled images are those of {FAMILIES[found]} ({found}).")
    elif sizes in SIZES:
        report.notes.append(
            f"{SIZES[sizes]} has these sizes; the images may be others ({found} is not known)."
        )
    else:
        report.notes.append(f"The labelled images are of no split known here ({found}).")


def _look_at_files(entries: dict[str, tuple[Entry, ...]], root: epath.Path, report: Report) -> None:
    """That every file there is, and pairs are of one size; counts the masks' values."""
    if not root.is_dir():
        report.errors.append(f"The data folder {root} is missing: correct --root.")
        return
    find = _Finder(root)
    for name, part in entries.items():
        missing = [e.image for e in part if find(e.image) is None]
        if missing:
            report.errors.append(f"The {name} list has {_some(missing)}, not there below {root}.")
        # Masks of unlabelled images are nobody's business.
        pairs = [(find(e.image), root / e.mask) for e in part if e.mask and name != "unlabeled"]
        lost = [os.fspath(mask) for _, mask in pairs if not mask.exists()]
        if lost:
            report.errors.append(f"The {name} list has {_some(lost)}, a mask that is not there.")
        there = [
            Example(os.fspath(image), os.fspath(image), os.fspath(mask))
            for image, mask in pairs
            if image is not None and mask.exists()
        ]
        _count(name, there, np.arange(256, dtype=np.int16), report)
    _compare_classes(report)


class _Finder:
    """Finds an image by its path below a root, or by its bare id anywhere below."""

    def __init__(self, root: epath.Path):
        self._root = root
        self._by_id: dict[str, epath.Path] | None = None

    def __call__(self, image: str) -> epath.Path | None:
        if (self._root / image).is_file():
            return self._root / image
        if "/" in image:
            return None
        if self._by_id is None:
            files = (f for f in files_below(self._root) if f.name.lower().endswith(IMAGE_SUFFIXES))
            self._by_id = {image_id(f.name): f for f in files}
        return self._by_id.get(image_id(image))


def _count(
    name: str, examples: Sequence[Example], table: Int[np.ndarray, "256"], report: Report
) -> None:
    """Adds the pixels of each class, and errors for pairs that cannot be used."""
    if not examples:
        return

    def look(example: Example) -> Int[np.ndarray, "256"] | str:
        try:
            assert example.mask is not None
            counts, size = labels.count_classes(example.mask, table)
            image_size = labels.image_size(example.image)
        except UserError as error:
            return str(error)
        if size != image_size:
            return f"{example.image} and its mask {example.mask} differ in size."
        return counts

    total = np.zeros(256, np.int64)
    wrong = []
    with futures.ThreadPoolExecutor() as pool:
        for found in pool.map(look, examples):
            if isinstance(found, str):
                wrong.append(found)
            else:
                total += found
    report.classes[name] = total
    report.errors += wrong[:SHOWN]
    if len(wrong) > SHOWN:
        report.errors.append(f"{len(wrong) - SHOWN} further pairs of {name} images are as bad.")


def _compare_classes(report: Report) -> None:
    """Classes that the student would be scored on and its teacher never saw."""
    learnt = report.classes.get("labeled")
    if learnt is None:
        return
    if report.names:
        ids = list(range(len(report.names)))
    else:
        scored = report.classes.get("val", learnt)
        ids = [i for i in range(labels.IGNORE) if learnt[i] or scored[i]]
    absent = [_class_name(i, report) for i in ids if not learnt[i]]
    if absent:
        report.warnings.append(f"No labelled pixel of {', '.join(absent)}.")


def _class_name(class_id: int, report: Report) -> str:
    return report.names[class_id] if report.names else f"value {class_id}"


def examine_config(config: Any) -> Report:
    """Looks at the data of a config, split as it says."""
    # Here, because sources read lists with `splits`, which is where the command is.
    from semiseg_jax.data import sources

    report = Report()
    try:
        dataset, _ = sources.plan(config, report.notes.append)
    except UserError as error:
        report.errors.append(str(error))
        return report
    report.names = dataset.classes
    sets = dict(zip(NAMES, (dataset.labeled, dataset.unlabeled, dataset.evaluation), strict=True))
    entries = {
        name: tuple(Entry(os.path.realpath(e.image), e.mask) for e in part)
        for name, part in sets.items()
    }
    for name, part in sets.items():
        report.sizes[name] = len(part)
        report.masks[name] = sum(e.mask is not None for e in part)
        if not part:
            report.errors.append(f"There is no {name} image.")
    _look_for_repeats(entries, report)
    _name_family({name: tuple(Entry(e.id, None) for e in p) for name, p in sets.items()}, report)
    for name in ("labeled", "val"):
        without = [e.image for e in sets[name] if e.mask is None]
        if without:
            report.errors.append(f"{_some(without)} in the {name} set without a mask.")
        _count(name, [e for e in sets[name] if e.mask], dataset.table, report)
    missing = [e.image for e in dataset.unlabeled if not os.path.exists(e.image)]
    if missing:
        report.errors.append(f"The unlabeled set has {_some(missing)}, not there.")
    _compare_classes(report)
    learnt = report.classes.get("labeled")
    if learnt is not None and learnt.any():
        try:
            sources.refuse_one_class(learnt, dataset.classes)
        except UserError as error:
            report.errors.append(str(error))
    report.notes.append(f"The split's hash is {dataset.split_hash}, as in result rows.")
    return report


def _some(names: Sequence[str]) -> str:
    """The first few of some names, and how many there are."""
    shown = ", ".join(names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{shown}{more}"


def print_report(report: Report, console: Console) -> None:
    """The report as tables and sentences."""
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


def _print_classes(report: Report, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="Share of labelled pixels, in %")
    table.add_column("", no_wrap=True)
    for name in report.classes:
        table.add_column(name, justify="right", no_wrap=True)
    totals = {
        name: max(counts[: labels.IGNORE].sum(), 1) for name, counts in report.classes.items()
    }
    known = len(report.names) or labels.IGNORE
    for i in range(known):
        if report.names or any(counts[i] for counts in report.classes.values()):
            shares = (f"{100 * c[i] / totals[n]:.2f}" for n, c in report.classes.items())
            table.add_row(_class_name(i, report), *shares)
    console.print(table)


def run() -> None:
    """The command."""
    # Defined here: the module may be imported beside another command, with a --config of its own.
    what = ("labelled", "unlabelled", "evaluation")
    holders = [
        *(
            flags.DEFINE_string(name, "", f"The list of {kind} images, a line each.")
            for name, kind in zip(NAMES, what, strict=True)
        ),
        flags.DEFINE_string("root", "", "The folder that the lists' paths are relative to."),
    ]
    for holder in holders:  # --help has the flags of the module that was started
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])
    command_line.define_config("Whose data to look at, instead of at lists")
    app.run(main, flags_parser=command_line.parse)


def main(argv: list[str]) -> None:
    """Prints what was found; exit status 1 where an error was."""
    given = flags.FLAGS
    command_line.options_only(argv)
    paths = {name: given[name].value or "" for name in NAMES}
    if given.config is not None:
        # Here, because it lies above: only the command looks at all of a config.
        from semiseg_jax import settings

        try:
            settings.check(given.config)
        except UserError as error:
            sys.exit(f"Error: {error}")
        report = examine_config(given.config)
    elif any(paths.values()):
        report = examine_lists(paths, given.root)
    else:
        sys.exit("Error: Say what to look at: --labeled=F --unlabeled=F --val=F, or --config=….")
    print_report(report, Console(highlight=False, soft_wrap=True))
    if report.errors:
        sys.exit(1)
