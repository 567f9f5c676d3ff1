"""Reads COCO annotations: polygons, run-length masks and boxes."""

import collections
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from semiseg_jax.data.annotations.record import (
    AnnotatedImage,
    AnnotatedObject,
    AnnotationSet,
    Size,
    malformed,
    normal_path,
)
from semiseg_jax.data.annotations.regions import Bitmap, Polygons, Region, rectangle
from semiseg_jax.runtime import json_forms

_IS_ID = json_forms.is_integer
_SIDE = json_forms.both(json_forms.is_number, lambda side: 0 <= side < 2**31)
_NUMBERS = json_forms.list_of(json_forms.is_number)
_IMAGE = json_forms.record(
    {"id": _IS_ID, "file_name": json_forms.is_text},
    {"width": json_forms.optional(_SIDE), "height": json_forms.optional(_SIDE)},
)
_CATEGORY = json_forms.record({"id": _IS_ID, "name": json_forms.is_text})
_ANNOTATION = json_forms.record(
    {"image_id": _IS_ID, "category_id": _IS_ID},
    {"iscrowd": json_forms.optional(json_forms.is_number)},
)
# Their sum is checked, so that they fit into memory if the image does.
_RUNS = json_forms.list_of(json_forms.both(json_forms.is_count, lambda run: run < 2**31))


def matches(content: Any) -> bool:
    """Returns whether the value of a JSON file is a set of COCO annotations of objects."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        return False
    annotations = content.get("annotations")
    # Captions have no categories, panoptic segmentations no category of their own.
    return isinstance(annotations, list) and "categories" in content


def read(contents: Mapping[Path, Any]) -> AnnotationSet:
    """Returns the annotations of COCO files, whose categories are matched by name.

    Args:
        contents: the value of each JSON file; they are one data set, in several splits.

    Raises:
        UserError: a file has another form, or names an image or a category twice.
    """
    labels: dict[str, None] = {}
    images: list[AnnotatedImage] = []
    notes: list[str] = []
    roots: set[str] = set()
    used: set[str] = set()
    for path, content in contents.items():
        names = _category_names(path, content, notes)
        # A root category stands above all others, as Roboflow exports it.
        roots |= {
            category["supercategory"]
            for category in content["categories"]
            if category.get("supercategory") not in (None, category["name"])
        }
        objects = _objects(path, content, names)
        used |= {o.label for of_image in objects.values() for o in of_image}
        labels.update(dict.fromkeys(names[id_] for id_ in sorted(names)))
        images += [
            AnnotatedImage(
                normal_path(image["file_name"]),
                path,
                _recorded_size(image) or _mask_size(path, objects[image["id"]]),
                tuple(objects[image["id"]]),
            )
            for image in content["images"]
        ]
    unused_roots = [name for name in labels if name in roots and name not in used]
    if unused_roots:
        notes.append(
            f"The category {', '.join(unused_roots)} stands above others and has no object: it is "
            "no class."
        )
    kept = tuple(name for name in labels if name not in unused_roots)
    return AnnotationSet(kept, tuple(images), tuple(notes))


def _category_names(path: Path, content: Any, notes: list[str]) -> dict[int, str]:
    """Returns the names of the categories of a file by id."""
    _check_entries(path, content, "images", _IMAGE, "an id and a file_name")
    _check_entries(path, content, "categories", _CATEGORY, "an id and a name")
    _check_entries(path, content, "annotations", _ANNOTATION, "an image_id and a category_id")
    for key in ("images", "categories"):
        counts = collections.Counter(entry["id"] for entry in content[key])
        repeated = [id_ for id_, count in counts.items() if count > 1]
        if repeated:
            raise malformed(path, f"has two {key} of the id {repeated[0]}")
    names = {c["id"]: c["name"].strip() for c in content["categories"]}
    if "" in names.values():
        raise malformed(path, "has a category without a name")
    for category in content["categories"]:
        supercategory = category.get("supercategory")
        if not json_forms.optional(json_forms.is_text)(supercategory):
            raise malformed(path, f"has a category {category['id']} whose supercategory is no text")
    for name, count in collections.Counter(names.values()).items():
        if count > 1:
            notes.append(f"{path} has {count} categories called {name}: they are one class.")
    return names


def _check_entries(path: Path, content: Any, key: str, form: json_forms.Form, has: str) -> None:
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise malformed(path, f"has no list of {key}")
    for number, entry in enumerate(content[key]):
        if not form(entry):
            raise malformed(path, f"has an entry {number} of {key} that is not one with {has}")


def _objects(
    path: Path, content: Any, names: Mapping[int, str]
) -> dict[int, list[AnnotatedObject]]:
    """Returns the objects of a file by the id of their image."""
    sizes = {image["id"]: _recorded_size(image) for image in content["images"]}
    objects: dict[int, list[AnnotatedObject]] = {id_: [] for id_ in sizes}
    for number, annotation in enumerate(content["annotations"]):
        where = f"has an annotation {annotation.get('id', number)}"
        if annotation["image_id"] not in sizes:
            raise malformed(path, f"{where} of image {annotation['image_id']}, which it has not")
        if annotation["category_id"] not in names:
            raise malformed(
                path, f"{where} of category {annotation['category_id']}, which it has not"
            )
        label = names[annotation["category_id"]]
        is_crowd = bool(annotation.get("iscrowd"))
        try:
            drawn = _parts(label, annotation, sizes[annotation["image_id"]], is_crowd)
        except ValueError as error:
            raise malformed(path, f"{where} whose {error}") from error
        objects[annotation["image_id"]] += drawn
    return objects


def _parts(label: str, annotation: Any, size: Size | None, is_crowd: bool) -> list[AnnotatedObject]:
    """Returns an object, and its polygons without an area as objects of their own.

    Raises:
        ValueError: with a text on what of it is malformed.
    """
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        region = _run_length_mask(segmentation, size)
        return [AnnotatedObject(label, "area", region, is_crowd)]
    if not segmentation:
        return [_box(label, annotation.get("bbox"), is_crowd)]
    # Some programs write one polygon without the list around it.
    polygons = [segmentation] if _NUMBERS(segmentation) else segmentation
    if not json_forms.list_of(_NUMBERS)(polygons):
        raise ValueError("segmentation is no list of polygons and no run-length mask")
    if any(len(polygon) % 2 for polygon in polygons):
        raise ValueError("segmentation has a polygon with an odd number of coordinates")
    parts = tuple(np.array(p, float).reshape(-1, 2) for p in polygons if len(p) >= 6)
    degenerate = [AnnotatedObject(label, "degenerate")] * (len(polygons) - len(parts))
    if not parts:
        return degenerate
    return [AnnotatedObject(label, "area", Polygons(parts), is_crowd), *degenerate]


def _box(label: str, box: Any, is_crowd: bool) -> AnnotatedObject:
    """Returns an object of which only the box is known, or not even that."""
    if not box:
        return AnnotatedObject(label, "degenerate")
    if not json_forms.list_of(json_forms.is_number, range(4, 5))(box):
        raise ValueError("bbox is not x, y, width and height")
    left, top, width, height = box
    return AnnotatedObject(label, "box", rectangle(left, top, left + width, top + height), is_crowd)


def _run_length_mask(segmentation: Mapping[str, Any], size: Size | None) -> Region:
    """Returns a mask of runs down the columns, as a list or as compressed text."""
    counts, shape = segmentation.get("counts"), segmentation.get("size")
    if not json_forms.list_of(json_forms.is_count, range(2, 3))(shape):
        raise ValueError("run-length mask has no size of two numbers")
    assert isinstance(shape, list)
    if size is not None and tuple(shape) != size:
        raise ValueError(
            f"run-length mask is {shape[1]}x{shape[0]} where its image is {size[1]}x{size[0]}"
        )
    if isinstance(counts, str):
        runs = decode_counts(counts)
    elif _RUNS(counts):
        runs = np.array(counts, np.int64)
    else:
        raise ValueError("run-length mask has counts that are neither text nor numbers from 0 on")
    if sum(runs.tolist()) != shape[0] * shape[1]:
        raise ValueError("run-length mask does not fill its size")
    return Bitmap(0, 0, runs, (shape[0], shape[1]), by_column=True)


def decode_counts(text: str) -> Int[np.ndarray, " runs"]:
    """Returns the runs of COCO's compressed text.

    A run is written in characters of 5 bits and a bit for "continues", the lowest bits first, and
    from the third run on as the difference to the run two before. pycocotools is not used here: of
    text that is too short, it returns pixels of memory that it never wrote.

    Raises:
        ValueError: the text is not of this form.
    """
    if not re.fullmatch(r"(?:[P-o]{0,11}[0-O])*", text, re.ASCII):
        raise ValueError("run-length mask has counts that cannot be decoded")
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if any(run < 0 or run >= 2**31 for run in runs):
        raise ValueError("run-length mask has counts that cannot be decoded")
    return np.array(runs, np.int64)


def choose(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Splits files into those to read and those that repeat their images with other annotations.

    COCO itself ships the same images as instances_….json and person_keypoints_….json.
    """
    instances = [path for path in paths if path.name.startswith("instances")]
    if not instances:
        return list(paths), []
    others = ("person_keypoints", "captions", "panoptic", "stuff", "image_info")
    left_out = [path for path in paths if path.name.startswith(others)]
    return [path for path in paths if path not in left_out], left_out


def _mask_size(path: Path, objects: Sequence[AnnotatedObject]) -> Size | None:
    """Returns the size of the run-length masks of an image; None if there are none."""
    sizes = {o.region.shape for o in objects if isinstance(o.region, Bitmap)}
    if len(sizes) > 1:
        raise malformed(path, "has run-length masks of several sizes for one image")
    return next(iter(sizes), None)


def _recorded_size(image: Mapping[str, Any]) -> Size | None:
    height, width = image.get("height"), image.get("width")
    return (int(height), int(width)) if height and width else None
