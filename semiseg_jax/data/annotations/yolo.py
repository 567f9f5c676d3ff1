"""Reads YOLO segmentations: a text file of polygons for each image, and names of classes."""

import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from semiseg_jax.data.annotations.record import (
    AnnotatedImage,
    AnnotatedObject,
    AnnotationSet,
    malformed,
    normal_path,
    read_text,
)
from semiseg_jax.data.annotations.regions import Polygons, rectangle
from semiseg_jax.runtime.errors import UserError

# Names of files that list classes, a line each, in the order of their ids.
CLASS_FILES = ("classes.txt", "obj.names", "labels.txt")
# Text files beside the labels that are none.
_OTHER_FILES = re.compile(r"(readme.*|license.*|train|valid?|test|autosplit_.*|requirements)\.txt")
_ROW = re.compile(r"\d+(?:\s+\S+)+")


def matches(path: Path) -> bool:
    """Returns whether a text file may be one of labels: it is empty, or its first row has an id."""
    if path.name.lower() in CLASS_FILES or _OTHER_FILES.fullmatch(path.name.lower()):
        return False
    try:
        text = read_text(path)
    except UserError:
        return False
    rows = text.split("\n")
    first = next((row.strip() for row in rows if row.strip()), "")
    return not first or bool(_ROW.fullmatch(first))


def is_class_file(path: Path) -> bool:
    """Returns whether a file names classes: a data.yaml with names, or a classes.txt.

    Raises:
        UserError: a YAML file is not readable, or malformed.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        content = _read_yaml(path)
        return isinstance(content, dict) and "names" in content
    return path.name.lower() in CLASS_FILES


def read(labels: Sequence[Path], class_files: Sequence[Path]) -> AnnotationSet:
    """Returns the annotations of YOLO label files.

    Args:
        labels: the text files; that of an image has its name, in a folder `labels` beside
            `images`, or beside it.
        class_files: the files that name the classes; their names must agree.

    Raises:
        UserError: a row is malformed, or the names of the classes are missing or contradict each
            other.
    """
    names = _class_names(labels[0].parent if labels else Path("."), class_files)
    lists = _split_lists(class_files)
    images = []
    for path in labels:
        stem = _image_stem(path)
        objects = tuple(
            _object(path, number, row, names)
            for number, row in enumerate(read_text(path).splitlines(), 1)
            if row.strip()
        )
        split = next((s for s, stems in lists.items() if stem in stems), "")
        images.append(AnnotatedImage(stem, path, None, objects, split))
    return AnnotationSet(tuple(names), tuple(images), empty_is_background=True)


def _image_stem(path: Path) -> str:
    """Returns the path of an image without its ending, from the path of its labels."""
    parts = list(path.with_suffix("").parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "labels":
            parts[i] = "images"
            break
    return PurePosixPath(*parts).as_posix()


def _object(path: Path, number: int, row: str, names: Sequence[str]) -> AnnotatedObject:
    try:
        class_id, *values = map(float, row.split())
    except ValueError as error:
        raise malformed(path, f"has a row {number} that is not all numbers") from error
    if class_id != int(class_id if math.isfinite(class_id) else 0.5) or class_id < 0:
        raise malformed(path, f"has a row {number} that does not begin with a class id")
    if not all(abs(value) < 1e9 for value in values):
        raise malformed(path, f"has a row {number} with numbers beyond all images")
    if class_id >= len(names):
        raise malformed(
            path,
            f"has a class id {int(class_id)} in row {number}, and there are {len(names)} names",
        )
    label = names[int(class_id)]
    if len(values) == 4:
        x, y, width, height = values
        (box,) = rectangle(x - width / 2, y - height / 2, x + width / 2, y + height / 2).parts
        return AnnotatedObject(label, "box", Polygons((box,), is_relative=True))
    if len(values) % 2:
        raise malformed(path, f"has a row {number} with an odd number of coordinates")
    if len(values) < 6:
        return AnnotatedObject(label, "degenerate")
    points = np.array(values).reshape(-1, 2)
    return AnnotatedObject(label, "area", Polygons((points,), is_relative=True))


def _class_names(folder: Path, class_files: Sequence[Path]) -> list[str]:
    if not class_files:
        raise UserError(
            f"The labels in {folder} have ids, and no file names them: put data.yaml with names, "
            "or classes.txt with a name in each line, beside them.",
            code="yolo-without-class-names",
        )
    named = {path: _names_in(path) for path in class_files}
    first, names = next(iter(named.items()))
    for path, others in named.items():
        if others != names:
            raise UserError(
                f"{first} and {path} name other classes: take one out of the folder.",
                code="yolo-class-names-contradict",
            )
    return names


def _names_in(path: Path) -> list[str]:
    """Returns the names of classes in the order of their ids."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        names: Any = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    else:
        names = _read_yaml(path)["names"]
        if isinstance(names, dict):
            ids = sorted(id_ for id_ in names if isinstance(id_, int))
            if ids != list(range(len(names))):
                raise malformed(path, "has names whose ids are not 0, 1, 2, …")
            names = [names[id_] for id_ in ids]
    # YAML reads the names yes, no and 1 as other types.
    if not isinstance(names, list) or not all(isinstance(n, str | int | float) for n in names):
        raise malformed(path, "has no list of names")
    names = [str(name).strip() for name in names]
    if not names or "" in names:
        raise malformed(path, "has no names, or an empty one")
    return names


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise malformed(path, "is no YAML") from error


def _split_lists(class_files: Sequence[Path]) -> dict[str, set[str]]:
    """Returns the images of each split that data.yaml names by a list of files."""
    lists: dict[str, set[str]] = {}
    for path in class_files:
        content = _read_yaml(path) if path.suffix.lower() in (".yaml", ".yml") else {}
        for split in ("train", "val", "test"):
            file = content.get(split)
            file = path.parent / Path(normal_path(file)).name if isinstance(file, str) else None
            if file is None or file.suffix != ".txt" or not file.is_file():
                continue
            lines = (normal_path(line.strip()) for line in read_text(file).splitlines())
            stems = {PurePosixPath(line).with_suffix("") for line in lines if line}
            lists.setdefault(split, set()).update(
                (path.parent / _below(stem)).as_posix() for stem in stems
            )
    return lists


def _below(stem: PurePosixPath) -> PurePosixPath:
    """Returns a path of a list relative to the data set, from its folder `images` on."""
    parts = stem.parts
    return PurePosixPath(*parts[parts.index("images") :]) if "images" in parts else stem
