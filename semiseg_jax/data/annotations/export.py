"""Writes label maps, such as predictions and pseudo-labels, as COCO or LabelMe annotations.

    OUTPUT/annotations/instances_default.json, OUTPUT/images/NAME.jpg      coco
    OUTPUT/NAME.json, OUTPUT/NAME.jpg                                      labelme

Vertices are corners of pixels. So the same label map comes back from the polygons, however often
this is repeated, and objects that touch have the same vertices where they do.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from semiseg_jax.data import image_io
from semiseg_jax.data.annotations import classes as class_names
from semiseg_jax.data.annotations import mask_folder
from semiseg_jax.data.annotations.image_files import ImageFiles
from semiseg_jax.data.annotations.record import (
    BACKGROUND_LABEL,
    IGNORE_LABEL,
    Size,
    malformed,
    read_json,
    read_text,
)
from semiseg_jax.data.annotations.tracing import TracedObject, objects_of
from semiseg_jax.data.dataset import files_below, is_image, normal_name
from semiseg_jax.data.sources.downscale import MAX_DOWNSCALE, shrunk
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime import json_forms
from semiseg_jax.runtime.errors import UserError

FORMATS = ("coco", "labelme")

# Files of predictions and of pseudo-labels that name the classes of the label maps beside them.
_RECORDS = ("predictions.json", "manifest.json")
_NAMES = json_forms.list_of(json_forms.is_text)


@dataclasses.dataclass
class Export:
    """What was written.

    Attributes:
        images: number of images.
        objects: number of objects by class.
        with_holes: objects with holes.
        too_small: objects left out because of `min_area`.
        enlarged: label maps of downscaled images.
        missing: label maps whose image is not there.
        left_out: name of the class whose pixels are no objects; "" if these are those of no label.
        has_ignored: pixels of no label are objects of IGNORE_LABEL.
    """

    images: int
    objects: dict[str, int]
    with_holes: int
    too_small: int
    missing: list[str]
    left_out: str
    has_ignored: bool = False
    enlarged: int = 0


@dataclasses.dataclass(frozen=True)
class _Labeled:
    """An image and its objects; `name` is its path in the new folder, without a split."""

    name: Path
    size: Size
    objects: Sequence[TracedObject]


def write(
    source: Path,
    format_: str,
    output: Path,
    images: Path | None = None,
    background: str = "background",
    names: Sequence[str] = (),
    link: bool = False,
    min_area: int = 0,
) -> Export:
    """Writes the label maps below a folder as annotations; the folder appears when it is complete.

    Args:
        source: a folder of predictions, of pseudo-labels, or one that `mask_folder` wrote.
        format_: one of FORMATS.
        output: the folder, which must not exist or be empty.
        images: the folder of the images; None for the folder `images` in `source`.
        background: the class whose pixels are no objects, if there is such a class.
        names: names of the classes in id order; () to read them from files in or beside `source`.
        link: whether images are linked, not copied.
        min_area: the fewest pixels of an object.

    Raises:
        UserError: there are no label maps, names or images, an image has another size than its
            label map, or the output is there already or cannot be written.
    """
    if not source.is_dir():
        raise UserError(
            f"--input: {source} is no folder: give a folder of masks, such as predictions.",
            code="masks-folder-missing",
        )
    mask_folder.check_new(output, source)
    masks = source / "masks" if (source / "masks").is_dir() else source
    names = tuple(map(class_names.normal, names)) or _class_names(source)
    label_maps = {
        file.relative_to(masks).with_suffix("").as_posix(): file
        for file in map(Path, files_below(epath.Path(masks)))
        if is_image(file.name, ".png")
    }
    pairs, missing = _pair(label_maps, ImageFiles(_image_folder(source, images)), masks)
    # Without a background, 255 is what is no object.
    left_out = names.index(background) if background in names else IGNORE
    export = Export(0, {}, 0, 0, missing, background if left_out != IGNORE else "")
    labels = dict(enumerate(names)) | {IGNORE: IGNORE_LABEL}
    table = image_io.id_table(len(names))
    with mask_folder.new_folder(output) as folder:
        labeled = []
        place = folder / "images" if format_ == "coco" else folder
        for mask, image, name in pairs:
            stored = image_io.read_mask(mask, table)
            label_map = _at_image_size(stored, mask, image)
            export.enlarged += label_map.shape != stored.shape
            objects, too_small = objects_of(label_map, {left_out}, min_area)
            export.too_small += too_small
            labeled.append(_Labeled(name, label_map.shape, objects))
            _count(export, objects, labels)
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            mask_folder.copy_or_link(image, place / name, link)
        if left_out == IGNORE or not export.has_ignored:
            labels.pop(IGNORE)
        _WRITERS[format_](folder, labeled, labels, left_out)
    return export


def _count(export: Export, objects: Sequence[TracedObject], labels: Mapping[int, str]) -> None:
    export.images += 1
    for object_ in objects:
        label = labels[object_.value]
        export.objects[label] = export.objects.get(label, 0) + 1
        export.with_holes += bool(object_.holes)
        export.has_ignored |= object_.value == IGNORE


def _class_names(source: Path) -> tuple[str, ...]:
    """Returns the names of the classes from the files in a folder, or in the one above."""
    for name in _RECORDS:
        if (source / name).is_file():
            content = read_json(source / name)
            if isinstance(content, dict) and "classes" in content:
                if not _NAMES(content["classes"]) or not content["classes"]:
                    raise malformed(source / name, "has classes that are no names")
                return tuple(map(class_names.normal, content["classes"]))
    for folder in (source, source.parent):
        path = folder / mask_folder.CLASSES
        if path.is_file():
            lines = map(class_names.normal, read_text(path).splitlines())
            return tuple(line for line in lines if line)
    raise UserError(
        f"{source} has no {', '.join(_RECORDS)} or {mask_folder.CLASSES} that names the classes: "
        "name them in --classes, in the order of their ids.",
        code="masks-without-class-names",
    )


def _image_folder(source: Path, images: Path | None) -> Path:
    if images is None and not (source / "images").is_dir():
        raise UserError(
            f"{source} has no folder of images: name the folder of the images that the masks are "
            "of in --images.",
            code="export-images-not-named",
        )
    return images or source / "images"


def _pair(
    label_maps: Mapping[str, Path], images: ImageFiles, masks: Path
) -> tuple[list[tuple[Path, Path, Path]], list[str]]:
    """Returns (mask, image, name) of each label map with an image, and the ids of the others."""
    if not label_maps:
        raise UserError(
            f"{masks} holds no PNG: give a folder of masks, such as predictions.",
            code="masks-folder-empty",
        )
    names = {file: file.relative_to(images.root) for file in images.files}
    by_id = {normal_name(name.with_suffix("").as_posix()): file for file, name in names.items()}
    pairs, missing = [], []
    for id_, mask in label_maps.items():
        image = by_id.get(normal_name(id_))
        if image is None:
            missing.append(id_)
        else:
            pairs.append((mask, image, names[image]))
    if not pairs:
        raise UserError(
            f"None of the {len(missing)} masks has an image of its name below {images.root}, "
            f"{missing[0]} first: name the folder of the images in --images.",
            code="masks-without-images",
        )
    return pairs, missing


def _at_image_size(
    label_map: UInt8[np.ndarray, "sh sw"], mask: Path, image: Path
) -> UInt8[np.ndarray, "h w"]:
    """Returns a label map in the size of its image.

    Pseudo-labels of a run with `data.downscale` have the size of the downscaled images, and are
    enlarged by nearest neighbour, as predictions are.

    Raises:
        UserError: the label map has neither the size of the image nor that divided by a factor.
    """
    upright = image_io.image_size(image)
    size = label_map.shape
    if size == upright:
        return label_map
    if all(shrunk(upright, factor) != size for factor in range(2, MAX_DOWNSCALE + 1)):
        raise UserError(
            f"{mask} is {size[1]}x{size[0]}, and {image} is {upright[1]}x{upright[0]}: give the "
            "images that the masks were made of.",
            code="mask-of-another-size",
        )
    # The pixel that contains the centre of each pixel of the image.
    rows, columns = (
        (2 * np.arange(large) + 1) * small // (2 * large)
        for small, large in zip(size, upright, strict=True)
    )
    return label_map[rows[:, None], columns]


def _write_coco(
    folder: Path, images: Sequence[_Labeled], labels: Mapping[int, str], left_out: int
) -> None:
    """Writes all images into one file, in the folders of CVAT's own COCO export.

    An object with holes is one polygon, whose holes are joined by cuts of no width: run-length
    masks, which could hold holes too, are taken for crowds by some tools, and edited by few.
    """
    ids = {value: id_ for id_, value in enumerate((v for v in labels if v != left_out), 1)}
    categories = [
        {"id": id_, "name": labels[value], "supercategory": ""} for value, id_ in ids.items()
    ]
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, 1):
        height, width = image.size
        name = image.name.as_posix()
        entries.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for object_ in image.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[object_.value],
                    "segmentation": [object_.joined.ravel().tolist()],
                    "area": object_.area,
                    "bbox": list(object_.box),
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": "semiseg_jax"},
        "licenses": [],
        "categories": categories,
        "images": entries,
        "annotations": annotations,
    }
    path = folder / "annotations" / "instances_default.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content), "utf-8")


def _write_labelme(
    folder: Path, images: Sequence[_Labeled], labels: Mapping[int, str], left_out: int
) -> None:
    """Writes a file beside each image. Holes are later shapes of BACKGROUND_LABEL, which cut."""
    for image in images:
        shapes = []
        # Large objects first, so that what is inside of a hole comes after the hole.
        for object_ in image.objects:
            shapes.append(_shape(labels[object_.value], object_.outer))
            shapes += [_shape(BACKGROUND_LABEL, hole) for hole in object_.holes]
        content: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": image.name.name,
            "imageData": None,
            "imageHeight": image.size[0],
            "imageWidth": image.size[1],
        }
        path = (folder / image.name).with_suffix(".json")
        path.write_text(json.dumps(content, indent=1), "utf-8")


def _shape(label: str, ring: Int[np.ndarray, "n 2"]) -> dict[str, Any]:
    return {
        "label": label,
        "points": ring.tolist(),
        "group_id": None,
        "description": "",
        "shape_type": "polygon",
        "flags": {},
        "mask": None,
    }


_Writer = Callable[[Path, Sequence[_Labeled], Mapping[int, str], int], None]
_WRITERS: dict[str, _Writer] = {"coco": _write_coco, "labelme": _write_labelme}
