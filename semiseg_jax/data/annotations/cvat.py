"""Reads CVAT's own format, "CVAT for images 1.1": an XML file."""

import re
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from semiseg_jax.data.annotations.record import (
    AnnotatedImage,
    AnnotatedObject,
    AnnotationSet,
    Size,
    malformed,
    normal_path,
)
from semiseg_jax.data.annotations.regions import (
    Bitmap,
    Ellipse,
    Points,
    Polygons,
    Stroke,
    rectangle,
)
from semiseg_jax.runtime import fileio
from semiseg_jax.runtime.errors import UserError, read_error

# Larger numbers are no coordinates.
_LARGEST = 1e9


def read_root(path: Path) -> ElementTree.Element:
    """Returns the root of an XML file.

    Raises:
        UserError: the file is not readable, is no XML, or declares a document type.
    """
    try:
        fileio.require_regular(path)
        content = path.read_bytes()
    except OSError as error:
        raise read_error(path, error, "make it readable, or take it out of the folder") from error

    def refuse(*_: object) -> None:
        raise UserError(
            f"{path} declares a document type, by which a file may fill the memory, and which CVAT "
            "does not write: take the DOCTYPE out of it.",
            code="xml-with-document-type",
        )

    # The checks come first, because ElementTree would expand entities.
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
        return ElementTree.fromstring(content)
    except (expat.ExpatError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise malformed(path, "is no XML, or truncated") from error


def matches(root: ElementTree.Element) -> bool:
    """Returns whether the root is that of CVAT's format, for images or for video."""
    is_cvat = root.find("meta") is not None or root.find("version") is not None
    return root.tag == "annotations" and (is_cvat or root.find("image") is not None)


def read(roots: Mapping[Path, ElementTree.Element]) -> AnnotationSet:
    """Returns the annotations of CVAT files.

    Args:
        roots: the root of each file.

    Raises:
        UserError: a file is of video, or malformed.
    """
    labels: dict[str, None] = {}
    images: list[AnnotatedImage] = []
    for path, root in roots.items():
        if root.find("track") is not None:
            raise UserError(
                f'{path} is "CVAT for video", whose shapes lie between frames: export the task as '
                '"CVAT for images 1.1".',
                code="cvat-for-video",
            )
        for label in root.iterfind("meta//labels/label"):
            # A tag or a skeleton has no area.
            if label.findtext("type") not in ("tag", "skeleton"):
                labels.setdefault((label.findtext("name") or "").strip())
        images += [_image(path, image) for image in root.iterfind("image")]
    labels.pop("", None)
    return AnnotationSet(tuple(labels), tuple(images))


def _image(path: Path, element: ElementTree.Element) -> AnnotatedImage:
    name = element.get("name")
    if not name:
        raise malformed(path, "has an image without a name")
    try:
        size = (_integer(element, "height"), _integer(element, "width"))
        shapes = [(_integer(shape, "z_order"), _object(shape, size)) for shape in element]
    except ValueError as error:
        raise malformed(path, f"has for {name} {error}") from error
    # The sort keeps the order of the file among shapes of one level.
    objects = tuple(object_ for _, object_ in sorted(shapes, key=lambda shape: shape[0]))
    return AnnotatedImage(
        normal_path(name), path, size if all(size) else None, objects, element.get("subset", "")
    )


def _object(shape: ElementTree.Element, size: Size) -> AnnotatedObject:
    """Returns an object; raises a ValueError whose text says what of it is malformed."""
    label = (shape.get("label") or "").strip()
    if not label:
        raise ValueError(f"a {shape.tag} without a label")
    match shape.tag:
        case "polygon":
            points = _points(shape)
            if len(points) < 3:
                return AnnotatedObject(label, "degenerate")
            return AnnotatedObject(label, "area", Polygons((points,)))
        case "box":
            left, top = _number(shape, "xtl"), _number(shape, "ytl")
            right, bottom = _number(shape, "xbr"), _number(shape, "ybr")
            region = rectangle(left, top, right, bottom, _number(shape, "rotation", 0.0))
            return AnnotatedObject(label, "area", region)
        case "ellipse":
            center = _number(shape, "cx"), _number(shape, "cy")
            radii = _number(shape, "rx"), _number(shape, "ry")
            angle = _number(shape, "rotation", 0.0)
            return AnnotatedObject(label, "area", Ellipse(center, radii, angle))
        case "mask":
            return AnnotatedObject(label, "area", _mask(shape, size))
        case "polyline" | "points":
            points = _points(shape)
            if not len(points):
                return AnnotatedObject(label, "degenerate")
            return AnnotatedObject(label, "line", Stroke(points))
    return AnnotatedObject(label, "other")


def _mask(shape: ElementTree.Element, image_size: Size) -> Bitmap:
    """Returns a mask of runs along the rows of its box."""
    size = _integer(shape, "height"), _integer(shape, "width")
    # Otherwise a few numbers might ask for more memory than there is.
    if not all(0 <= side <= most for side, most in zip(size, image_size, strict=True)):
        raise ValueError("a mask whose box is larger than the image")
    text = shape.get("rle") or ""
    if not re.fullmatch(r"\s*\d{1,10}(?:\s*,\s*\d{1,10})*\s*,?\s*", text, re.ASCII):
        raise ValueError("a mask whose rle is no list of numbers")
    runs = np.array([int(run) for run in text.split(",") if run.strip()], np.int64)
    if sum(runs.tolist()) != size[0] * size[1]:
        raise ValueError("a mask whose rle does not fill its box")
    return Bitmap(_integer(shape, "top"), _integer(shape, "left"), runs, size)


def _points(shape: ElementTree.Element) -> Points:
    pairs = [pair for pair in (shape.get("points") or "").split(";") if pair.strip()]
    values = [[_finite(shape, "points", value) for value in pair.split(",")] for pair in pairs]
    if any(len(value) != 2 for value in values):
        raise ValueError(f"a {shape.tag} whose points are not x,y;x,y;…")
    return np.array(values, float).reshape(-1, 2)


def _number(shape: ElementTree.Element, key: str, default: float | None = None) -> float:
    text = shape.get(key)
    if text is None and default is not None:
        return default
    return _finite(shape, key, text or "")


def _finite(shape: ElementTree.Element, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(f"a {shape.tag} whose {key} is no number") from error
    if not abs(value) < _LARGEST:
        raise ValueError(f"a {shape.tag} whose {key} is beyond all images")
    return value


def _integer(element: ElementTree.Element, key: str) -> int:
    """Returns a whole number; 0 if the element has none of this name."""
    return round(_number(element, key, 0.0))
