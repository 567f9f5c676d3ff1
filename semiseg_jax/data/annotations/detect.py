"""Finds the annotation files below a folder, and their format."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from semiseg_jax.data.annotations import coco, colors, cvat, labelme, yolo
from semiseg_jax.data.annotations.record import AnnotationSet, read_json
from semiseg_jax.data.dataset import files_below
from semiseg_jax.runtime.errors import UserError

FORMATS = ("coco", "labelme", "yolo", "cvat", "colors")


@dataclasses.dataclass
class _Files:
    """The annotation files of each format, with their content; of YOLO those that name classes."""

    coco: dict[Path, Any] = dataclasses.field(default_factory=dict)
    labelme: dict[Path, Any] = dataclasses.field(default_factory=dict)
    cvat: dict[Path, Any] = dataclasses.field(default_factory=dict)
    yolo: list[Path] = dataclasses.field(default_factory=list)
    colors: list[Path] = dataclasses.field(default_factory=list)
    class_files: list[Path] = dataclasses.field(default_factory=list)
    others: list[Path] = dataclasses.field(default_factory=list)

    def of(self, format_: str) -> list[Path]:
        """The files of a format."""
        return list(getattr(self, format_))


def read(source: Path, format_: str = "") -> tuple[str, AnnotationSet]:
    """Returns the format of annotation files and what they hold.

    Args:
        source: a folder as a tool exports it, or one annotation file.
        format_: one of FORMATS; "" to find it out.

    Raises:
        UserError: there is no annotation file, there are some of two formats, or one is malformed.
    """
    if not source.exists():
        raise UserError(
            f"--input: {source} is missing: give the folder that a tool exported, or its "
            "annotation file.",
            code="annotations-missing",
        )
    files = _scan(source, format_)
    # A COCO file says in itself what it is; rows of numbers may be anything.
    found = [f for f in FORMATS if (not format_ or f == format_) and files.of(f)]
    if len(found) > 1 and "yolo" in found and not files.class_files:
        found.remove("yolo")
    if not found:
        raise UserError(
            f"{source} holds no annotations{f' of {format_}' if format_ else ''}"
            f"{_describe_others(files)}: give the unpacked folder that was exported as COCO, "
            'LabelMe, YOLO segmentation, "CVAT for images 1.1" or "Segmentation mask 1.1".',
            code="annotations-not-found",
        )
    if len(found) > 1:
        raise UserError(
            f"{source} holds annotations of {found[0]}, such as {files.of(found[0])[0]}, and of "
            f"{found[1]}, such as {files.of(found[1])[0]}: say with --from which to read.",
            code="annotation-formats-ambiguous",
        )
    return found[0], _read(found[0], files)


def _read(format_: str, files: _Files) -> AnnotationSet:
    if format_ == "coco":
        chosen, left_out = coco.choose(list(files.coco))
        result = coco.read({path: files.coco[path] for path in chosen})
        notes = [f"{path} repeats the images of {chosen[0]}: not read." for path in left_out]
        return dataclasses.replace(result, notes=(*result.notes, *notes))
    if format_ == "labelme":
        return labelme.read(files.labelme)
    if format_ == "cvat":
        return cvat.read(files.cvat)
    if format_ == "colors":
        return colors.read(files.colors)
    return yolo.read(files.yolo, files.class_files)


def _scan(source: Path, format_: str) -> _Files:
    """Reads the files below a folder that may be annotations of a format, or of any."""
    files = _Files()
    paths = [source] if source.is_file() else list(map(Path, files_below(epath.Path(source))))
    if source.is_file() and source.suffix.lower() in (".yaml", ".yml"):
        paths = list(map(Path, files_below(epath.Path(source.parent))))
    for path in paths:
        suffix = path.suffix.lower()
        if suffix == ".json" and format_ in ("", "coco", "labelme"):
            _sort_json(path, read_json(path), files)
        elif suffix == ".xml" and format_ in ("", "cvat"):
            root = cvat.read_root(path)
            (files.cvat.update({path: root}) if cvat.matches(root) else files.others.append(path))
        elif colors.matches(path) and format_ in ("", "colors"):
            files.colors.append(path)
        elif suffix in (".txt", ".yaml", ".yml", ".names") and format_ in ("", "yolo"):
            if yolo.is_class_file(path):
                files.class_files.append(path)
            elif suffix == ".txt" and yolo.matches(path):
                files.yolo.append(path)
        elif suffix in (".zip", ".tar", ".gz"):
            files.others.append(path)
    return files


def _sort_json(path: Path, content: Any, files: _Files) -> None:
    if coco.matches(content):
        files.coco[path] = content
    elif labelme.matches(content):
        # Whole images, which would fill the memory; they are read again where they are needed.
        files.labelme[path] = _without_image(content)
    else:
        files.others.append(path)


def _without_image(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "imageData"}


def _describe_others(files: _Files) -> str:
    others = [path.name for path in files.others[:3]]
    return f" ({', '.join(others)} are of another kind)" if others else ""
