"""Hashes of what an annotation says, by which merging notices the files that nobody changed.

A tool that opens and saves a file writes other bytes of the same shapes. So the shapes are hashed,
not the bytes: labels and points, in their order where the order matters.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from semiseg_jax.data import image_io
from semiseg_jax.data.annotations.record import malformed, read_json
from semiseg_jax.runtime import hashes

# Tools round coordinates; a vertex that moved by less was not moved by a person.
_DIGITS = 1


def of_labelme(path: Path) -> str:
    """Returns a hash of the shapes of a LabelMe file, in their order: later ones are on top.

    Raises:
        UserError: the file is not readable or of another form.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise malformed(path, "has no shapes")
    try:
        shapes = [
            [
                shape["label"],
                shape.get("shape_type") or "polygon",
                _rounded(shape["points"]),
                shape.get("mask"),
            ]
            for shape in content["shapes"]
        ]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise malformed(path, "has a shape that is not one with a label and points") from error
    return hashes.hash_json(shapes)


def of_coco(path: Path) -> dict[str, str]:
    """Returns a hash of the objects of each image of a COCO file, by the name in the file.

    Ids, their order, areas and boxes do not matter; the order of objects does not either, as the
    objects of a label map do not overlap.

    Raises:
        UserError: the file is not readable or of another form.
    """
    content = read_json(path)
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        objects: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            segmentation = annotation.get("segmentation")
            is_polygons = isinstance(segmentation, list)
            form = [_rounded(p) for p in segmentation] if is_polygons else segmentation
            objects[annotation["image_id"]].append(
                hashes.hash_json([names[annotation["category_id"]], form])
            )
        return {
            image["file_name"].replace("\\", "/"): hashes.hash_json(sorted(objects[image["id"]]))
            for image in content["images"]
        }
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise malformed(path, "has no images, annotations and categories that fit together") from (
            error
        )


def of_mask(path: Path) -> str:
    """Returns a hash of the pixels of a mask that is written as class ids.

    Raises:
        UserError: the file is not readable.
    """
    values, _ = image_io.read_png(path)
    return of_pixels(values)


def of_pixels(values: np.ndarray) -> str:
    """Returns a hash of the size and the values of an array."""
    return hashes.hash_bytes(repr(values.shape).encode() + np.ascontiguousarray(values).tobytes())


def _rounded(points: Iterable[Any]) -> list[Any]:
    # + 0.0, so that -0.0 equals 0.0.
    return (np.round(np.array(list(points), float), _DIGITS) + 0.0).tolist()


def untouched(written: Mapping[str, str], now: Mapping[str, str]) -> set[str]:
    """Returns the keys whose hashes are still those that were written."""
    return {key for key, value in written.items() if now.get(key) == value}
