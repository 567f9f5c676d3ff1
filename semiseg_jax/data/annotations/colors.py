"""Reads masks in colour that a list of colours lies beside: "Segmentation mask 1.1" of CVAT.

labelmap.txt                        LABEL:R,G,B:PARTS:ACTIONS, a line each; # begins a comment
SegmentationClass/NAME.png          the masks, in colour or with a palette
JPEGImages/NAME.jpg                 the images, which may be anywhere
ImageSets/Segmentation/train.txt    the names of the images of a split, a line each
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath
from jaxtyping import UInt8

from semiseg_jax.data import image_io, split_folders
from semiseg_jax.data.annotations import image_files
from semiseg_jax.data.annotations.record import (
    AnnotatedImage,
    AnnotatedObject,
    AnnotationSet,
    malformed,
    read_text,
)
from semiseg_jax.data.annotations.regions import Bitmap, runs_of
from semiseg_jax.data.dataset import files_below, is_image
from semiseg_jax.data.mask_format import Color, MaskFormat
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime.errors import UserError

LIST = "labelmap.txt"
_MASKS = "SegmentationClass"
_LINE = re.compile(r"(?P<label>[^:]+):(?P<color>\d{1,3},\d{1,3},\d{1,3})(?::.*)?")


def matches(path: Path) -> bool:
    """Returns whether a file is a list of colours."""
    return path.name.lower() == LIST


def read(paths: Sequence[Path]) -> AnnotationSet:
    """Returns the annotations of masks in colour: all pixels of a class are one object.

    Args:
        paths: the lists of colours; the masks are in the folder beside each.

    Raises:
        UserError: a list is malformed, there are no masks beside it, or a mask has other colours.
    """
    labels: dict[str, None] = {}
    images: list[AnnotatedImage] = []
    for path in paths:
        colors = _colors(path)
        labels.update(dict.fromkeys(colors))
        folder = path.parent / _MASKS
        masks = [Path(f) for f in files_below(epath.Path(folder))] if folder.is_dir() else []
        masks = [mask for mask in masks if is_image(mask.name, ".png")]
        if not masks:
            raise malformed(path, f"has no masks in a folder {_MASKS} beside it")
        splits = _splits(path.parent)
        for mask in masks:
            name = mask.relative_to(folder).with_suffix("").as_posix()
            label_map = _label_map(mask, path, colors)
            objects = tuple(
                AnnotatedObject(label, "area", _pixels(label_map == value))
                for value, label in enumerate(colors)
                if np.any(label_map == value)
            )
            images.append(
                AnnotatedImage(name, mask, label_map.shape, objects, splits.get(name, ""))
            )
    return AnnotationSet(tuple(labels), tuple(images))


def _colors(path: Path) -> dict[str, Color]:
    """Returns the colour of each label of a list."""
    colors: dict[str, Color] = {}
    for number, text in enumerate(read_text(path).splitlines(), 1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if not match:
            raise malformed(path, f"has a line {number} that is not LABEL:R,G,B:PARTS:ACTIONS")
        red, green, blue = map(int, match["color"].split(","))
        label = match["label"].strip()
        if max(red, green, blue) > 255:
            raise malformed(path, f"has a line {number} with a colour above 255")
        if label in colors or (red, green, blue) in colors.values():
            raise malformed(path, f"has a line {number} whose label or colour it has already")
        colors[label] = (red, green, blue)
    if not 1 <= len(colors) <= IGNORE:
        raise malformed(path, f"has {len(colors)} labels, where masks hold 1 to {IGNORE}")
    return colors


def _splits(folder: Path) -> dict[str, str]:
    """Returns the split of each image that a list of a split names."""
    lists = sorted((folder / "ImageSets" / "Segmentation").glob("*.txt"))
    return {
        line.strip(): path.stem
        for path in lists
        if split_folders.split_of(path.stem) in image_files.SPLITS
        for line in read_text(path).splitlines()
    }


def _label_map(mask: Path, path: Path, colors: Mapping[str, Color]) -> UInt8[np.ndarray, "h w"]:
    """Returns the position of each pixel's colour in the list."""
    form = MaskFormat(tuple((color, value) for value, color in enumerate(colors.values())))
    try:
        return image_io.read_mask(mask, image_io.id_table(max(len(colors), 2)), form)
    except UserError as error:
        if error.code != "mask-colors-unknown":
            raise
        raise UserError(
            f"{mask} has colours that {path} does not list: add them there, each with its label, "
            "or export the masks again.",
            code="mask-colors-not-in-label-map",
        ) from error


def _pixels(inside: np.ndarray) -> Bitmap:
    return Bitmap(0, 0, runs_of(inside), inside.shape)
