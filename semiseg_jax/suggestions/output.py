"""Writes the folder of suggestions.

    OUTPUT/suggestions.csv, suggestions.json    rank, image, reasons
    OUTPUT/contact_sheet.jpg                    the images above their uncertainty maps
    OUTPUT/uncertainty/NAME.png                 entropy of each pixel: black is sure
    OUTPUT/labelme/NAME.json, NAME.jpg          the network's labels, to be corrected in LabelMe
    OUTPUT/coco/annotations, coco/images        the same as COCO
    OUTPUT/masks/NAME.png                       the same as class ids; palette PNGs
    OUTPUT/classes.txt                          names of the classes in id order

The folder appears when it is complete, and no folder that is there is ever written to: it may hold
labels that somebody corrected.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from semiseg_jax.data import image_io
from semiseg_jax.data.annotations import export, image_files, mask_folder
from semiseg_jax.data.dataset import Example
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import downscaling
from semiseg_jax.suggestions import contact_sheet, fingerprints, record, uncertainty
from semiseg_jax.suggestions.ranking import Suggestion
from semiseg_jax.suggestions.scoring import Scorer

COCO_FILE = Path("coco", "annotations", "instances_default.json")
# The longest side of the pictures that the contact sheet is drawn from, in pixels.
_THUMBNAIL = 600
_Thumbnail = UInt8[np.ndarray, "_ _ 3"]


def choose_folder(given: str, workdir: str) -> Path:
    """Returns the folder to write to; without a given one, a new folder in the workdir.

    Raises:
        UserError: the given folder is there and not empty.
    """
    if given:
        output = Path(os.path.abspath(given))
        if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
            raise UserError(
                f"{given} exists already, and may hold labels that somebody corrected: merge them "
                "with --merge, and give another --output.",
                code="suggest-output-exists",
            )
        return output
    number = 1
    while os.path.lexists(folder := _numbered(workdir, number)):
        number += 1
    return folder


def _numbered(workdir: str, number: int) -> Path:
    name = record.FOLDER if number == 1 else f"{record.FOLDER}_{number}"
    return Path(os.path.abspath(workdir), name)


def write(
    output: Path,
    suggestions: Sequence[Suggestion],
    examples: Sequence[Example],
    scorer: Scorer,
    classes: tuple[str, ...],
    palette: Sequence[Sequence[int]],
    about: dict[str, Any],
    min_area: int,
) -> None:
    """Writes the folder.

    Args:
        output: the folder, which must not exist or be empty.
        suggestions: the first one first.
        examples: their images, in the same order.
        scorer: predicts them.
        classes: names in id order.
        palette: their colours.
        about: further entries of suggestions.json.
        min_area: objects of fewer pixels are left out of LabelMe and COCO.

    Raises:
        UserError: a file cannot be read or written.
    """
    files = [Path(example.image) for example in examples]
    root = Path(os.path.commonpath([file.absolute().parent for file in files]))
    named = image_files.new_names(
        [file.absolute() for file in files], root, {file.absolute(): "" for file in files}
    )
    names = [Path(named[file.absolute()]) for file in files]
    with mask_folder.new_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        thumbnails = [
            _write_image(source, folder, name, example, scorer, palette)
            for name, example in zip(names, examples, strict=True)
        ]
        (source / mask_folder.CLASSES).write_text("".join(f"{c}\n" for c in classes), "utf-8")
        (folder / mask_folder.CLASSES).write_text("".join(f"{c}\n" for c in classes), "utf-8")
        for format_ in export.FORMATS:
            export.write(source, format_, folder / format_, min_area=min_area)
        titles = [example.id for example in examples]
        sheet = contact_sheet.draw(titles, *map(list, zip(*thumbnails, strict=True)))
        (folder / "contact_sheet.jpg").write_bytes(sheet)
        coco = fingerprints.of_coco(folder / COCO_FILE)
        images = [
            {
                "rank": rank,
                "id": example.id,
                "name": name.as_posix(),
                "image": os.path.abspath(example.image),
                "size": list(image_io.image_size(example.image)),
                "sentence": suggestion.sentence,
                "reasons": dict(suggestion.reasons),
                "written": {
                    "labelme": fingerprints.of_labelme(
                        (folder / "labelme" / name).with_suffix(".json")
                    ),
                    "coco": coco[name.as_posix()],
                    "mask": fingerprints.of_mask((folder / "masks" / name).with_suffix(".png")),
                },
            }
            for rank, (name, example, suggestion) in enumerate(
                zip(names, examples, suggestions, strict=True), 1
            )
        ]
        (folder / record.TABLE).write_bytes(record.encode_table(images))
        content = {
            "format": record.FORMAT,
            **about,
            "classes": list(classes),
            "palette": [list(map(int, color)) for color in palette],
            "images": images,
        }
        (folder / record.RECORD).write_bytes(record.encode(content))


def _write_image(
    source: Path,
    folder: Path,
    name: Path,
    example: Example,
    scorer: Scorer,
    palette: Sequence[Sequence[int]],
) -> tuple[_Thumbnail, _Thumbnail]:
    """Writes the image, its mask and its uncertainty; returns small pictures of it and of that.

    Args:
        source: the folder that is exported as annotations.
        folder: the folder of suggestions.
        name: path of the image in both.
        example: the image.
        scorer: predicts it.
        palette: colours of the classes.
    """
    image = scorer.small_image(example)
    mean = uncertainty.average(scorer.views([image])[0])
    size = image_io.image_size(example.image)
    classes = downscaling.enlarge(mean.argmax(axis=-1).astype(np.uint8), size)
    mask = image_io.encode_mask(classes, palette)
    unsure = contact_sheet.uncertainty_picture(uncertainty.entropy_map(mean))
    picture = contact_sheet.encode_png(downscaling.enlarge(unsure, size))
    for path, content in (
        (source / "masks" / name, mask),
        (folder / "masks" / name, mask),
        (folder / "uncertainty" / name, picture),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").write_bytes(content)
    copied = source / "images" / name
    copied.parent.mkdir(parents=True, exist_ok=True)
    mask_folder.copy_or_link(Path(example.image), copied, link=True)
    return _thumbnail(image), _thumbnail(unsure)


def _thumbnail(picture: UInt8[np.ndarray, "h w 3"]) -> _Thumbnail:
    small = Image.fromarray(picture)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(small)
