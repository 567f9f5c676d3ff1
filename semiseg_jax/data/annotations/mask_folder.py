"""Writes annotations as a folder of images and masks, which `configs/folder.py` reads.

OUTPUT/images/NAME.jpg, masks/NAME.png      in folders train, val and test if there are splits
OUTPUT/classes.txt                          names of the classes in id order, a line each
OUTPUT/labeled.txt, unlabeled.txt           the images with and without a mask, for training
OUTPUT/val.txt, test.txt                    the images of these splits
OUTPUT/OUTPUT.py                            the config, with the names of the classes
OUTPUT/conversion.json                      what was converted, and how
"""

import collections
import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from semiseg_jax.data import image_header, image_io
from semiseg_jax.data.annotations import classes as class_names
from semiseg_jax.data.annotations import drawing, image_files
from semiseg_jax.data.annotations.classes import Classes
from semiseg_jax.data.annotations.drawing import DrawCounts, DrawOptions
from semiseg_jax.data.annotations.image_files import ImageFiles
from semiseg_jax.data.annotations.record import AnnotatedImage, AnnotationSet, malformed
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime import fileio
from semiseg_jax.runtime.errors import UserError, read_error, write_error

RECORD = "conversion.json"
CLASSES = "classes.txt"

_CONFIG = '''"""The data of this folder; docs/own_data.md describes what else may be set."""

from pathlib import Path

from configs import folder

CLASSES = (
{classes}
)


def get_config(network=""):
    config = folder.get_config(network)
    config.data.root = str(Path(__file__).resolve().parent)
    config.data.classes = CLASSES
    return config
'''


@dataclasses.dataclass(frozen=True)
class Options:
    """How annotations become masks.

    Attributes:
        draw: how objects are drawn.
        background: the class of pixels of no object; "ignore" if they have none.
        empty: images whose annotations are empty are "unlabeled" or "background"; "" for the
            format's own meaning.
        classes: names of all classes in id order; () for those of the annotations.
        link: whether images are linked, not copied.
    """

    draw: DrawOptions = dataclasses.field(default_factory=DrawOptions)
    background: str = "background"
    empty: str = ""
    classes: tuple[str, ...] = ()
    link: bool = False


@dataclasses.dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        classes: names of the classes in id order.
        pixels: pixels of each class id and of IGNORE in all masks.
        counts: objects, as `DrawCounts`.
        images: number of images in each list, by its name.
        empty: images whose annotations are empty.
        empty_are: what they became, "unlabeled" or "background".
        areas_missing: images all of whose objects have no area: unlabelled.
        unnamed: images that no annotation names: unlabelled.
        left_out: images of val and test without a mask, which nothing reads.
        missing: names of annotated images that are not there.
        turned: images whose annotations lay on the stored image, and were turned upright.
        orientation_unclear: images with an EXIF orientation where the sizes do not tell.
        notes: sentences.
    """

    classes: tuple[str, ...]
    pixels: Int[np.ndarray, "256"]
    counts: DrawCounts
    images: dict[str, int]
    empty: int
    empty_are: str
    areas_missing: int
    unnamed: int
    left_out: int
    missing: list[str]
    turned: int
    orientation_unclear: list[str]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An image of the new folder.

    Attributes:
        file: the image file; of an image that its annotation file holds, where it would be.
        split: name of its folder in the new folder, or "".
        annotated: its annotations; None if no annotation file names it.
        is_inline: whether its annotation file holds it.
    """

    file: Path
    split: str
    annotated: AnnotatedImage | None
    is_inline: bool = False


@dataclasses.dataclass
class _Result:
    """What became of an image; `values` is the histogram of its mask, None if it has none."""

    values: Int[np.ndarray, "256"] | None
    counts: DrawCounts
    is_turned: bool = False
    is_unclear: bool = False


def write(
    annotations: AnnotationSet, files: ImageFiles, output: Path, options: Options
) -> Conversion:
    """Writes a folder of images and masks; it appears under its name when it is complete.

    Args:
        annotations: of the images.
        files: the image files.
        output: the folder, which must not exist or be empty.
        options: how annotations become masks.

    Raises:
        UserError: `output` is there already or cannot be written, images are missing or have other
            sizes, or no object would be drawn.
    """
    check_new(output, files.root)
    used = {object_.label for image in annotations.images for object_ in image.objects}
    classes = class_names.resolve(annotations.labels, used, options.background, options.classes)
    if drawing.all_ignored(annotations.images, options.draw):
        raise UserError(
            "All objects are boxes alone or iscrowd, and would be ignored: give --boxes=draw or "
            "--crowd=class to draw them (CVAT marks every mask of its brush iscrowd).",
            code="all-objects-ignored",
        )
    entries, missing = _entries(annotations, files)
    empty_are = options.empty or ("background" if annotations.empty_is_background else "unlabeled")
    if empty_are == "background" and classes.background == IGNORE:
        empty_are = "unlabeled"
    with new_folder(output) as folder:
        writer = _Writer(folder, files.root, entries, classes, options, empty_are)
        # Not in threads: they would go on writing while a signal removes the folder.
        results = [writer.write_image(entry) for entry in entries]
        conversion = _summarize(entries, results, classes, empty_are)
        conversion.missing = missing
        conversion.notes = [*annotations.notes, *_class_notes(classes)]
        if not conversion.images["labeled"]:
            raise UserError(
                f"No image of {files.root} for training has an object that can be drawn: see what "
                "--boxes, --line_width and --empty change.",
                code="conversion-without-masks",
            )
        if _is_background_unused(conversion, classes, options):
            writer.remove_background()
            conversion.classes = classes.names[1:]
            conversion.pixels = np.append(conversion.pixels[1:IGNORE], [0, conversion.pixels[-1]])
        writer.write_texts(results, conversion, output.absolute().name)
    return conversion


def check_new(output: Path, source: Path) -> None:
    """Checks the output folder before anything is read or written.

    Raises:
        UserError: it is there and not empty, or it is inside of the folder that is read.
    """
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(
            f"{output} exists already, and nothing in it is overwritten: remove it, or give "
            "another --output.",
            code="conversion-output-exists",
        )
    if Path(os.path.realpath(source)) in Path(os.path.realpath(output)).parents:
        raise UserError(
            f"--output is {output}, inside of {source}, where its images would be read as others: "
            "give a folder elsewhere.",
            code="conversion-output-inside-input",
        )


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a folder that has the name of the output once it is complete, and is removed else.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with fileio.complete_folder(output) as folder:
            yield folder
    except OSError as error:
        raise write_error(output, error) from error


def copy_or_link(image: Path, path: Path, link: bool) -> None:
    """Copies an image to a path, or makes a symbolic link to it there.

    Raises:
        UserError: the image is not readable, or no regular file.
        OSError: the path cannot be written.
    """
    if link:
        path.symlink_to(os.path.realpath(image))
        return
    image_header.check_regular(image)
    try:
        image.open("rb").close()
    except OSError as error:
        raise read_error(image, error, "make it readable, or take it out of the folder") from error
    shutil.copyfile(image, path)


def _entries(annotations: AnnotationSet, files: ImageFiles) -> tuple[list[_Entry], list[str]]:
    """Returns the images of the new folder, and the names of annotated images that are missing."""
    found: dict[Path, AnnotatedImage] = {}
    inline: set[Path] = set()
    missing: list[str] = []
    for image in annotations.images:
        file = files.find(image)
        if file is None and image.inline is not None and image.inline():
            file = files.path_of_inline(image)
            inline.add(file)
        if file is None:
            missing.append(image.name)
        elif file in found:
            raise UserError(
                f"{file} is annotated twice, as {found[file].name} in {found[file].source} and as "
                f"{image.name} in {image.source}: take it out of one.",
                code="image-annotated-twice",
            )
        else:
            found[file] = image
    if not found:
        raise UserError(
            f"None of the {len(missing)} annotated images is below {files.root}, "
            f"{', '.join(missing[:3])} first: put them there, or name their folder with --images.",
            code="annotated-images-missing",
        )
    splits = {
        file: image_files.split_of_image(found[file], file, files)
        if file in found
        else files.split_of(file)
        for file in (*files.files, *sorted(inline))
    }
    folders = image_files.roles(list(splits.values()))
    entries = [
        _Entry(file, folders[split], found.get(file), file in inline)
        for file, split in splits.items()
    ]
    return entries, missing


class _Writer:
    """Writes the files of a new folder."""

    def __init__(
        self,
        folder: Path,
        root: Path,
        entries: Sequence[_Entry],
        classes: Classes,
        options: Options,
        empty_are: str,
    ):
        self._folder = folder
        self._entries = entries
        self._classes = classes
        self._options = options
        self._empty_are = empty_are
        self._palette = image_io.generated_palette(len(classes.names))
        names = image_files.new_names(
            [e.file for e in entries], root, {e.file: e.split for e in entries}
        )
        self._names = {file: Path(name) for file, name in names.items()}

    def _image_path(self, entry: _Entry) -> Path:
        """Returns the path of an image relative to the new folder."""
        return Path("images", entry.split, self._names[entry.file])

    def _mask_path(self, entry: _Entry) -> Path:
        return Path("masks", entry.split, self._names[entry.file]).with_suffix(".png")

    def write_image(self, entry: _Entry) -> _Result:
        """Writes an image, and its mask if it has one."""
        image_path = self._folder / self._image_path(entry)
        self._write_image_file(entry, image_path)
        label_map, result = self._label_map(entry, image_path)
        if label_map is not None:
            result.values = np.bincount(label_map.ravel(), minlength=IGNORE + 1)
            path = self._folder / self._mask_path(entry)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_io.encode_mask(label_map, self._palette))
        elif entry.split in ("val", "test"):
            # Without a mask it cannot be evaluated, and it must not be trained on.
            image_path.unlink()
        return result

    def _write_image_file(self, entry: _Entry, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.is_inline and entry.annotated and entry.annotated.inline:
            path.write_bytes(entry.annotated.inline())
        else:
            copy_or_link(entry.file, path, self._options.link)

    def _label_map(
        self, entry: _Entry, image_path: Path
    ) -> tuple[UInt8[np.ndarray, "h w"] | None, _Result]:
        result = _Result(None, DrawCounts())
        image = entry.annotated
        if image is None or (not image.objects and self._empty_are == "unlabeled"):
            return None, result
        try:
            with image_io.open_header(image_path if entry.is_inline else entry.file) as header:
                upright, orientation = header.size, header.orientation
        except UserError as error:
            if entry.is_inline:
                raise malformed(image.source, "has an imageData that is no image") from error
            raise
        size, is_upright = drawing.annotated_size(image, entry.file, upright, orientation)
        label_map, result.counts = drawing.draw(image, size, self._classes, self._options.draw)
        if label_map is not None and not is_upright:
            label_map = drawing.turn_upright(label_map, orientation)
        result.is_turned = not is_upright
        result.is_unclear = (
            orientation != 1 and is_upright and (orientation < 5 or upright[0] == upright[1])
        )
        return label_map, result

    def remove_background(self) -> None:
        """Takes the class 0 out of all masks; no pixel has it."""
        palette = image_io.generated_palette(len(self._classes.names) - 1)
        for entry in self._entries:
            path = self._folder / self._mask_path(entry)
            if path.exists():
                label_map, _ = image_io.read_png(path)
                label_map = np.where(label_map == IGNORE, IGNORE, label_map - 1).astype(np.uint8)
                path.write_bytes(image_io.encode_mask(label_map, palette))

    def write_texts(self, results: Sequence[_Result], conversion: Conversion, name: str) -> None:
        """Writes the class list, the split lists, the config, and the record last."""
        lists: dict[str, list[str]] = collections.defaultdict(list)
        for entry, result in zip(self._entries, results, strict=True):
            image = self._image_path(entry).as_posix()
            if result.values is not None:
                # The TAB says where a name ends that contains blanks.
                mask = self._mask_path(entry).as_posix()
                lists[_list_name(entry, True)].append(f"{image}\t{mask}\n")
            elif entry.split not in ("val", "test"):
                lists["unlabeled"].append(f"{image}\tNone\n")
        for list_name, lines in lists.items():
            (self._folder / f"{list_name}.txt").write_text("".join(lines), "utf-8")
        (self._folder / CLASSES).write_text(
            "".join(f"{name}\n" for name in conversion.classes), "utf-8"
        )
        rows = "\n".join(f"    {name!r}," for name in conversion.classes)
        (self._folder / config_name(name)).write_text(_CONFIG.format(classes=rows), "utf-8")
        record = {"classes": list(conversion.classes), "options": dataclasses.asdict(self._options)}
        record |= _described(conversion)
        (self._folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def _is_background_unused(conversion: Conversion, classes: Classes, options: Options) -> bool:
    """Returns whether there is a background of no pixel, which the user did not name."""
    is_unused = classes.background == 0 and not conversion.pixels[0]
    return is_unused and not options.classes and len(classes.names) > 2


def config_name(folder: str) -> str:
    """Returns the name of the config file of a folder; a run is named after it."""
    return f"{re.sub(r'[^A-Za-z0-9_]+', '_', folder).strip('_') or 'converted'}.py"


def _list_name(entry: _Entry, has_mask: bool) -> str:
    if entry.split in ("val", "test"):
        return entry.split
    return "labeled" if has_mask else "unlabeled"


def _summarize(
    entries: Sequence[_Entry], results: Sequence[_Result], classes: Classes, empty_are: str
) -> Conversion:
    counts = DrawCounts()
    pixels = np.zeros(IGNORE + 1, np.int64)
    images = dict.fromkeys(("labeled", "unlabeled"), 0)
    empty = areas_missing = unnamed = left_out = 0
    for entry, result in zip(entries, results, strict=True):
        counts.add(result.counts)
        has_mask = result.values is not None
        if result.values is not None:
            pixels += result.values
        if entry.annotated is None:
            unnamed += 1
        elif not entry.annotated.objects:
            empty += 1
        else:
            areas_missing += not has_mask
        if entry.split in ("val", "test") and not has_mask:
            left_out += 1
        else:
            name = _list_name(entry, has_mask)
            images[name] = images.get(name, 0) + 1
    unclear = [os.fspath(e.file) for e, r in zip(entries, results, strict=True) if r.is_unclear]
    return Conversion(
        classes=classes.names,
        pixels=pixels,
        counts=counts,
        images=images,
        empty=empty,
        empty_are=empty_are,
        areas_missing=areas_missing,
        unnamed=unnamed,
        left_out=left_out,
        missing=[],
        turned=sum(result.is_turned for result in results),
        orientation_unclear=unclear,
        notes=[],
    )


def _class_notes(classes: Classes) -> list[str]:
    return [
        f"The classes {one} and {other} differ in upper and lower case alone: are they one?"
        for one, other in class_names.differ_in_case(classes.names)
    ]


def _described(conversion: Conversion) -> Mapping[str, Any]:
    """Returns what the record has of a conversion."""
    counts = conversion.counts
    return {
        "images": conversion.images,
        "objects": dict(counts.objects),
        "not_drawn_as_they_are": dict(counts.skipped),
        "contested_pixels": counts.contested,
        "uncovered_pixels": counts.uncovered,
        "empty_annotations": conversion.empty,
        "empty_are": conversion.empty_are,
        "missing_images": conversion.missing,
        "turned_upright": conversion.turned,
    }
