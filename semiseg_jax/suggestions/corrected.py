"""Reads the labels of a folder of suggestions: which were changed, and the label maps of these."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from semiseg_jax.data import image_io, mask_format
from semiseg_jax.data.annotations import classes as class_names
from semiseg_jax.data.annotations import coco, drawing, labelme
from semiseg_jax.data.annotations.record import AnnotatedImage, read_json
from semiseg_jax.data.dataset import files_below
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.suggestions import fingerprints

FORMS = ("labelme", "coco", "mask")
_BACKGROUND = "background"


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of suggestions as it is now.

    Attributes:
        path: of the folder.
        images: entries of suggestions.json.
        classes: names in id order.
        palette: the colours that masks were written in.
    """

    path: Path
    images: Sequence[Mapping[str, Any]]
    classes: tuple[str, ...]
    palette: Sequence[Sequence[int]]

    def changed(self) -> dict[str, str]:
        """Returns the form, out of FORMS, in which each image was corrected, by its id.

        Raises:
            UserError: an image was corrected in two forms, or a file is malformed.
        """
        coco_now = self._coco_hashes()
        forms: dict[str, str] = {}
        for entry in self.images:
            now = self._hashes(entry, coco_now)
            changed = [f for f in FORMS if f in now and now[f] != entry["written"][f]]
            if len(changed) > 1:
                raise UserError(
                    f"{self.path}: the labels of {entry['name']} were changed as {changed[0]} and "
                    f"as {changed[1]}: keep one, and remove the image from the other.",
                    code="suggestion-changed-twice",
                )
            if changed:
                forms[entry["id"]] = changed[0]
        return forms

    def label_map(self, entry: Mapping[str, Any], form: str) -> UInt8[np.ndarray, "h w"]:
        """Returns the labels of an image: class ids and IGNORE.

        Args:
            entry: of the image in suggestions.json.
            form: one of FORMS.

        Raises:
            UserError: a label is no class, or the labels are not of the size of the image.
        """
        if form == "mask":
            label_map = self._read_mask(self._mask_path(entry))
        else:
            label_map = self._draw(entry, self._annotated(entry, form))
        if list(label_map.shape) != list(entry["size"]):
            raise UserError(
                f"{self._mask_path(entry)} is {label_map.shape[1]}x{label_map.shape[0]} and its "
                f"image {entry['size'][1]}x{entry['size'][0]}: save it in the size of the image.",
                code="suggestion-size-differs",
            )
        return label_map

    def strangers(self) -> list[str]:
        """Returns the LabelMe files of images that were not suggested."""
        known = {self._labelme_path(entry) for entry in self.images}
        folder = self.path / "labelme"
        below = map(Path, files_below(epath.Path(folder))) if folder.is_dir() else ()
        return [os.fspath(f) for f in below if f.suffix == ".json" and f not in known]

    def _hashes(self, entry: Mapping[str, Any], coco_now: Mapping[str, str]) -> dict[str, str]:
        """Returns the present hash of each form that is there."""
        hashes = {}
        if self._labelme_path(entry).is_file():
            hashes["labelme"] = fingerprints.of_labelme(self._labelme_path(entry))
        if (in_coco := _of_name(coco_now, entry["name"])) is not None:
            hashes["coco"] = in_coco
        if self._mask_path(entry).is_file():
            hashes["mask"] = fingerprints.of_pixels(self._read_mask(self._mask_path(entry)))
        return hashes

    def _labelme_path(self, entry: Mapping[str, Any]) -> Path:
        return (self.path / "labelme" / entry["name"]).with_suffix(".json")

    def _mask_path(self, entry: Mapping[str, Any]) -> Path:
        return (self.path / "masks" / entry["name"]).with_suffix(".png")

    def _coco_files(self) -> dict[Path, Any]:
        folder = self.path / "coco"
        below = map(Path, files_below(epath.Path(folder))) if folder.is_dir() else ()
        contents = {path: read_json(path) for path in below if path.suffix.lower() == ".json"}
        return {path: content for path, content in contents.items() if coco.matches(content)}

    def _coco_hashes(self) -> dict[str, str]:
        hashes: dict[str, str] = {}
        for path in self._coco_files():
            hashes |= fingerprints.of_coco(path)
        return hashes

    def _annotated(self, entry: Mapping[str, Any], form: str) -> AnnotatedImage:
        if form == "labelme":
            path = self._labelme_path(entry)
            return labelme.read({path: read_json(path)}).images[0]
        images = {image.name: image for image in coco.read(self._coco_files()).images}
        image = _of_name(images, entry["name"])
        assert image is not None  # It was changed, hence is there.
        return image

    def _draw(self, entry: Mapping[str, Any], image: AnnotatedImage) -> UInt8[np.ndarray, "h w"]:
        names = tuple(map(class_names.normal, self.classes))
        used = {class_names.normal(o.label) for o in image.objects}
        known = {*names, class_names.BACKGROUND_LABEL, class_names.IGNORE_LABEL}
        if unknown := sorted(used - known):
            raise UserError(
                f"{image.source} has the label {unknown[0]!r}, which is no class of the run "
                f"({', '.join(names)}): correct it in the annotation tool.",
                code="suggestion-label-unknown",
            )
        background = _BACKGROUND if _BACKGROUND in names else class_names.NO_BACKGROUND
        classes = class_names.resolve(names, used, background, names)
        with image_io.open_header(entry["image"]) as header:
            upright, orientation = header.size, header.orientation
        size, is_upright = drawing.annotated_size(image, entry["image"], upright, orientation)
        label_map, _ = drawing.draw(image, size, classes, drawing.DrawOptions())
        if label_map is None:
            return np.full(upright, IGNORE, np.uint8)
        return label_map if is_upright else drawing.turn_upright(label_map, orientation)

    def _read_mask(self, path: Path) -> UInt8[np.ndarray, "h w"]:
        """Reads a mask of class ids, or of their colours, as some programs save it."""
        table = image_io.id_table(len(self.classes))
        values, _ = image_io.read_png(path)
        if values.ndim == 2:
            return image_io.read_mask(path, table)
        full = image_io.full_palette(self.palette)
        ids = [*range(len(self.classes)), IGNORE]
        colors = tuple(((int(r), int(g), int(b)), i) for i in ids for r, g, b in [full[i]])
        return image_io.read_mask(path, table, mask_format.MaskFormat(colors))


def _of_name(values: Mapping[str, Any], name: str) -> Any:
    """Returns the value of an image; tools may have dropped the folders of its name."""
    if name in values:
        return values[name]
    last = Path(name).name
    matching = [value for key, value in values.items() if Path(key).name == last]
    return matching[0] if len(matching) == 1 else None
