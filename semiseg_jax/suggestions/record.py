"""suggestions.json: what was suggested, why, and the hashes of the files to correct."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from etils import epath

from semiseg_jax.runtime import fileio, json_forms
from semiseg_jax.runtime.errors import UserError

RECORD, TABLE = "suggestions.json", "suggestions.csv"
FORMAT = 1
# The folder of a workdir that suggestions are written to unless another is given.
FOLDER = "suggest"

_HASHES = json_forms.mapping_of(json_forms.is_text)
_IMAGE = json_forms.record(
    {
        "rank": json_forms.is_count,
        "id": json_forms.is_text,
        "name": json_forms.is_text,
        "image": json_forms.is_text,
        "size": json_forms.list_of(json_forms.is_count, range(2, 3)),
        "sentence": json_forms.is_text,
        "reasons": json_forms.mapping_of(json_forms.optional(json_forms.is_number)),
        "written": json_forms.record(
            dict.fromkeys(("labelme", "coco", "mask"), json_forms.is_text)
        ),
    }
)
_FORM = json_forms.record(
    {
        "format": lambda value: value == FORMAT,
        "workdir": json_forms.is_text,
        "by": json_forms.is_text,
        "classes": json_forms.list_of(json_forms.is_text),
        "palette": json_forms.list_of(json_forms.list_of(json_forms.is_count, range(3, 4))),
        "images": json_forms.list_of(_IMAGE),
        "aside": _HASHES,
        "classes_without_labels": json_forms.list_of(json_forms.is_text),
    }
)


def encode(content: dict[str, Any]) -> bytes:
    """Returns the bytes of suggestions.json."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def encode_table(images: list[dict[str, Any]]) -> bytes:
    """Returns the bytes of suggestions.csv: a row for each image."""
    reasons = list(images[0]["reasons"]) if images else []
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["rank", "image", *reasons, "sentence"])
    for image in images:
        values = ["" if v is None else v for v in image["reasons"].values()]
        writer.writerow([image["rank"], image["id"], *values, image["sentence"]])
    return buffer.getvalue().encode()


def read(folder: Path) -> dict[str, Any]:
    """Returns the content of suggestions.json.

    Raises:
        UserError: it is missing, damaged or of another form.
    """
    content = fileio.read_json(epath.Path(folder) / RECORD, _FORM)
    if content is None:
        raise UserError(
            f"{folder / RECORD} is missing or damaged: give the folder that the suggestions were "
            "written to in --merge, with this file in it.",
            code="suggestions-missing",
        )
    return content


def find(workdir: epath.Path) -> dict[str, Any] | None:
    """Returns the newest suggestions in a workdir; None if there are none."""
    folders = [folder for folder in workdir.glob(f"{FOLDER}*") if (folder / RECORD).is_file()]
    newest = max(folders, key=lambda folder: (folder / RECORD).stat().mtime, default=None)
    return newest and fileio.read_json(newest / RECORD, _FORM)
