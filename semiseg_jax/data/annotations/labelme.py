"""Reads LabelMe annotations: a JSON file for each image."""

import base64
import binascii
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from semiseg_jax.data import image_header
from semiseg_jax.data.annotations.record import (
    BACKGROUND_LABEL,
    IGNORE_LABEL,
    AnnotatedImage,
    AnnotatedObject,
    AnnotationSet,
    malformed,
    normal_path,
    read_json,
)
from semiseg_jax.data.annotations.regions import (
    Bitmap,
    Ellipse,
    Points,
    Polygons,
    Stroke,
    rectangle,
    runs_of,
)
from semiseg_jax.runtime import json_forms

_SIDE = json_forms.both(json_forms.is_count, lambda side: side < 2**31)
_FILE = json_forms.record(
    {"shapes": json_forms.list_of(json_forms.is_object), "imagePath": json_forms.is_text},
    {"imageHeight": json_forms.optional(_SIDE), "imageWidth": json_forms.optional(_SIDE)},
)
_POINT = json_forms.list_of(json_forms.is_number, range(2, 3))
_SHAPE = json_forms.record(
    {"label": json_forms.is_text, "points": json_forms.list_of(_POINT)},
    {
        "shape_type": json_forms.optional(json_forms.is_text),
        "mask": json_forms.optional(json_forms.is_text),
    },
)
_LINES = ("line", "linestrip", "point", "points")


def matches(content: Any) -> bool:
    """Returns whether the value of a JSON file is that of a LabelMe file."""
    return isinstance(content, dict) and "shapes" in content and "imagePath" in content


def read(contents: Mapping[Path, Any]) -> AnnotationSet:
    """Returns the annotations of LabelMe files.

    Args:
        contents: the value of each JSON file; the image in it ("imageData") may be taken out.

    Raises:
        UserError: a file has another form.
    """
    images = [_image(path, content) for path, content in contents.items()]
    used = {object_.label for image in images for object_ in image.objects}
    # LabelMe has no list of classes: in the order of their names, the order is always the same.
    labels = sorted(used - {BACKGROUND_LABEL, IGNORE_LABEL})
    return AnnotationSet(tuple(labels), tuple(images))


def _image(path: Path, content: Any) -> AnnotatedImage:
    if not _FILE(content):
        raise malformed(path, "has no shapes or no imagePath, or an impossible size")
    height, width = content.get("imageHeight"), content.get("imageWidth")
    objects = []
    for number, shape in enumerate(content["shapes"]):
        if not _SHAPE(shape) or not shape["label"].strip():
            raise malformed(path, f"has a shape {number} that is not one with a label and points")
        try:
            objects.append(_object(shape))
        except ValueError as error:
            raise malformed(path, f"has a shape {number} whose {error}") from error
    # An image path is relative to the file, in the notation of the system that wrote it.
    name = normal_path(content["imagePath"]) or path.stem
    return AnnotatedImage(
        name,
        path,
        (height, width) if height and width else None,
        tuple(objects),
        inline=lambda: inline_image(path),
    )


def inline_image(path: Path) -> bytes:
    """Returns the image inside a LabelMe file; empty if there is none.

    Raises:
        UserError: the file is not readable, or what it holds is not base64.
    """
    data = read_json(path).get("imageData")
    try:
        return base64.b64decode(re.sub(r"\s", "", data), validate=True) if data else b""
    except (TypeError, ValueError, binascii.Error) as error:
        raise malformed(path, "has an imageData that cannot be decoded") from error


def _object(shape: Mapping[str, Any]) -> AnnotatedObject:
    """Returns an object; raises a ValueError whose text says what of it is malformed."""
    label, kind = shape["label"].strip(), shape.get("shape_type") or "polygon"
    points = np.array(shape["points"], float).reshape(-1, 2)
    enough = {"polygon": 3, "rectangle": 2, "circle": 2, "mask": 2, "oriented_rectangle": 3}
    if kind in _LINES:
        region = Stroke(points) if len(points) else None
        return AnnotatedObject(label, "line" if region else "degenerate", region)
    if kind not in (*enough, "rotation"):
        return AnnotatedObject(label, "other")
    if len(points) < enough.get(kind, 3):
        return AnnotatedObject(label, "degenerate")
    if kind == "circle":
        radius = float(np.hypot(*(points[1] - points[0])))
        center = float(points[0, 0]), float(points[0, 1])
        return AnnotatedObject(label, "area", Ellipse(center, (radius, radius)))
    if kind == "mask":
        return AnnotatedObject(label, "area", _mask(shape.get("mask"), points))
    if kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        return AnnotatedObject(label, "area", rectangle(left, top, right, bottom))
    return AnnotatedObject(label, "area", Polygons((points,)))


def _mask(data: str | None, points: Points) -> Bitmap:
    """Returns a mask that is stored as a PNG, from the first point of its box on."""
    try:
        stored = base64.b64decode(data or "", validate=True)
        image = image_header.ImageFile("the mask", io.BytesIO(stored)).decode()
    except Exception as error:  # Pillow's decoders raise many types.
        raise ValueError("mask cannot be decoded") from error
    pixels = np.asarray(image if image.mode != "P" else image.convert("L"))
    pixels = (pixels if pixels.ndim == 2 else pixels[..., 0]) != 0
    left, top = points.min(axis=0).clip(-(2.0**31), 2.0**31).astype(int).tolist()
    return Bitmap(top, left, runs_of(pixels), pixels.shape)
