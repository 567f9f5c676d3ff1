"""What the readers of annotation files return: the same for all formats."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from semiseg_jax.data.annotations.regions import Region
from semiseg_jax.runtime import fileio
from semiseg_jax.runtime.errors import UserError, read_error

# Labels that mean no class, in any format; LabelMe has these names.
BACKGROUND_LABEL, IGNORE_LABEL = "_background_", "__ignore__"

# "area" is drawn. "box" is an object of which only the box is known, "line" a line or a point:
# options decide on both. "degenerate" has too few vertices, "other" is no area, such as a tag.
Kind = Literal["area", "box", "line", "degenerate", "other"]

# (height, width) in pixels.
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class AnnotatedObject:
    """An object of an image.

    Attributes:
        label: name of its class.
        kind: whether it has an area.
        region: its area, box or line; None for the kinds "degenerate" and "other".
        is_crowd: COCO's iscrowd; CVAT sets it for every mask that was drawn with a brush.
    """

    label: str
    kind: Kind
    region: Region | None = None
    is_crowd: bool = False


@dataclasses.dataclass(frozen=True)
class AnnotatedImage:
    """An image and its objects.

    Attributes:
        name: the path of the image as the file has it, with "/" between folders.
        source: the annotation file.
        size: size of the image as the file has it; None if it has none.
        objects: in the order in which they are drawn.
        split: name of its split as the file has it, such as "Train"; "" if it names none.
        inline: returns the bytes of an image that the annotation file holds.
    """

    name: str
    source: Path
    size: Size | None
    objects: tuple[AnnotatedObject, ...]
    split: str = ""
    inline: Callable[[], bytes] | None = None


@dataclasses.dataclass(frozen=True)
class AnnotationSet:
    """The content of the annotation files of a data set.

    Attributes:
        labels: names of classes in the order of their ids; objects may have others.
        images: the images that the files name.
        notes: sentences on what was found and decided.
        empty_is_background: whether a file without objects says that the image has none.
    """

    labels: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]
    notes: tuple[str, ...] = ()
    empty_is_background: bool = False


def malformed(path: os.PathLike[str], problem: str) -> UserError:
    """Returns the error of a file whose content is not that of its format.

    Args:
        path: of the file.
        problem: what is wrong, such as "has no images".
    """
    return UserError(
        f"{path} {problem}: export it again, repair it, or take it out of the folder.",
        code="annotations-malformed",
    )


def read_text(path: Path) -> str:
    """Returns the text of a file, without a byte order mark.

    Raises:
        UserError: it is not readable, or not UTF-8.
    """
    try:
        return fileio.read_text(path).removeprefix("\ufeff")
    except OSError as error:
        raise read_error(path, error, "make it readable, or take it out of the folder") from error
    except ValueError as error:
        raise malformed(path, "is not UTF-8") from error


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file.

    Raises:
        UserError: it is not readable, or no JSON.
    """
    text = read_text(path)
    try:
        return fileio.parse_json(text)
    except ValueError as error:
        problem = "is empty" if not text.strip() else "is no JSON, or truncated"
        raise malformed(path, problem) from error


def normal_path(path: str) -> str:
    """Returns a path of any system with "/" between folders."""
    return path.replace("\\", "/")
