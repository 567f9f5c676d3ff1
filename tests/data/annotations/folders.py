"""Folders as annotation tools export them, a few pixels small, and their conversion."""

import json
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from semiseg_jax.data.annotations import detect, mask_folder
from semiseg_jax.data.annotations.drawing import DrawOptions
from semiseg_jax.data.annotations.image_files import ImageFiles

# (x, y) of a square from 2 to 8, and of one inside it from 4 to 6.
SQUARE = [[2, 2], [8, 2], [8, 8], [2, 8]]
HOLE = [[4, 4], [6, 4], [6, 6], [4, 6]]
# One polygon around the square without the hole, with a cut between them.
RING = [[2, 2], [8, 2], [8, 8], [2, 8], [2, 4], [4, 4], [4, 6], [6, 6], [6, 4], [2, 4]]


def write_image(path, size=(12, 10), orientation=1, level=120):
    """Writes an image of (width, height)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (level, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


def write_json(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_text(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def flat(points):
    return [float(value) for point in points for value in point]


def coco_object(image_id=1, category_id=1, polygons=(SQUARE,), **others):
    segmentation = [flat(polygon) for polygon in polygons]
    entry = {"id": 1, "image_id": image_id, "category_id": category_id, "iscrowd": 0}
    return {**entry, "segmentation": segmentation, **others}


def coco(images=("a.png",), objects=(), categories=((1, "car"),), size=(12, 10)):
    """The content of a COCO file; the ids of images are 1, 2, …"""
    sides = {"width": size[0], "height": size[1]} if size else {}
    return {
        "images": [{"id": i, "file_name": n, **sides} for i, n in enumerate(images, 1)],
        "annotations": list(objects),
        "categories": [{"id": i, "name": n} for i, n in categories],
    }


def shape(label="car", points=SQUARE, kind="polygon", **others):
    return {"label": label, "points": points, "shape_type": kind, **others}


def labelme(*shapes, image="a.png", size=(12, 10)):
    sides = {"imageWidth": size[0], "imageHeight": size[1]} if size else {}
    return {"version": "5.5.0", "shapes": list(shapes), "imagePath": image, **sides}


def cvat(shapes="", labels=("car",), name="a.png", size=(12, 10), subset=""):
    names = "".join(f"<label><name>{n}</name><type>any</type></label>" for n in labels)
    of_subset = f' subset="{subset}"' if subset else ""
    image = f'<image id="0" name="{name}" width="{size[0]}" height="{size[1]}"{of_subset}>'
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>'
        f"<meta><job><labels>{names}</labels></job></meta>{image}{shapes}</image></annotations>"
    )


def cvat_points(points):
    return ";".join(f"{x},{y}" for x, y in points)


def yolo_row(class_id, points, size=(12, 10)):
    return f"{class_id} " + " ".join(f"{x / size[0]} {y / size[1]}" for x, y in points)


def convert(source, output, format_="", images=None, link=False, **options):
    """Converts annotations; options are those of `DrawOptions` and of `mask_folder.Options`."""
    draw = {k: options.pop(k) for k in ("overlap", "crowd", "boxes", "line_width") if k in options}
    _, annotations = detect.read(Path(source), format_)
    return mask_folder.write(
        annotations,
        ImageFiles(Path(images or source)),
        Path(output),
        mask_folder.Options(draw=DrawOptions(**draw), link=link, **options),
    )


def read_mask(path):
    return np.array(Image.open(path))


def drawn(*regions, size=(12, 10)):
    """A label map of (width, height): each region is (slice of x, slice of y, value)."""
    label_map = np.zeros(size[::-1], np.uint8)
    for columns, rows, value in regions:
        label_map[rows, columns] = value
    return label_map


SQUARE_DRAWN = drawn((slice(2, 8), slice(2, 8), 1))
RING_DRAWN = drawn((slice(2, 8), slice(2, 8), 1), (slice(4, 6), slice(4, 6), 0))


def coco_decode(encoded):
    """The pixels of a run-length mask by pycocotools."""
    with warnings.catch_warnings():
        # It calls NumPy as was usual before NumPy 2.
        warnings.simplefilter("ignore", DeprecationWarning)
        return coco_mask.decode(encoded).astype(bool)
