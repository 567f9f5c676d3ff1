"""The output folder of predictions: which of its files earlier predictions wrote.

predictions.json records each file that was written there, with a hash of its content. Any other
file, and any that was changed since, belongs to the user and is never overwritten.
"""

import os
from collections.abc import Collection, Mapping
from concurrent import futures
from typing import Any

from etils import epath

from semiseg_jax.data.dataset import files_below
from semiseg_jax.runtime import fileio, hashes, json_forms
from semiseg_jax.runtime.errors import UserError

# The record, which also describes the model.
RECORD = "predictions.json"
OVERLAYS, PROBABILITIES = "overlays", "probabilities"

_FORM = json_forms.record(
    {
        "classes": json_forms.list_of(json_forms.is_text),
        "protocol": json_forms.is_object,
        "model": json_forms.is_object,
        "code_version": json_forms.is_text,
        "ended": json_forms.is_flag,
    },
    {"files": json_forms.mapping_of(json_forms.optional(json_forms.is_text), json_forms.is_name)},
)


def read_record(folder: epath.PathLike) -> dict[str, Any] | None:
    """Returns the content of predictions.json; None if there is none, or it is of something else.

    Raises:
        UserError: the file is not readable.
    """
    return fileio.read_json(epath.Path(folder) / RECORD, _FORM)


def content_hash(content: bytes) -> str:
    """Returns what the record holds of the content of a file, 16 hex digits."""
    return hashes.hash_bytes(content)


def claim_files(folder: epath.PathLike, names: Collection[str]) -> dict[str, str | None]:
    """Checks that files may be written, before anything is written.

    Args:
        folder: the output folder.
        names: paths of the files, relative to it.

    Returns:
        The files that earlier predictions wrote there, with the hash of each; None for the hash
        where the prediction that wrote the file did not end.

    Raises:
        UserError: one of the files is there and no prediction wrote it, or it was changed since.
    """
    folder = epath.Path(folder)
    record = read_record(folder)
    if record is None and _exists(folder / RECORD):
        raise UserError(
            f"{folder / RECORD} is there already, and is not the record of a prediction: give "
            "another --output.",
            code="output-record-of-something-else",
        )
    written = {} if record is None else record.get("files")
    if written is None:
        return dict.fromkeys(_predictions_below(folder))
    if not folder.exists():
        return {}
    with futures.ThreadPoolExecutor() as pool:
        own = pool.map(lambda name: _is_own(folder / name, name, written), names)
        others = [name for name, is_own in zip(names, own, strict=True) if not is_own]
    if others:
        changed = others[0] in written
        problem = "was changed since it was written" if changed else "is no prediction"
        raise UserError(
            f"{folder / others[0]} is there already, and {problem}: move it, or give another "
            "--output.",
            code="output-holds-other-files",
        )
    return written


def _is_own(path: epath.Path, name: str, written: Mapping[str, str | None]) -> bool:
    """Returns whether a file may be written: it is not there, or a prediction wrote it."""
    if not _exists(path):
        return True
    if name not in written:
        return False
    expected = written[name]
    try:
        return expected is None or content_hash(path.read_bytes()) == expected
    except OSError:
        return False


def _exists(path: epath.Path) -> bool:
    """Returns whether a path exists, also as a link without a target."""
    return os.path.lexists(path) if fileio.has_rename(path) else path.exists()


def _predictions_below(folder: epath.Path) -> list[str]:
    """Returns the files with names of predictions: older code did not record what it wrote."""
    subfolders = (("", ".png"), (OVERLAYS, ".jpg"), (PROBABILITIES, ".npz"))
    return [
        file.relative_to(folder).as_posix()
        for subfolder, suffix in subfolders
        if (folder / subfolder).is_dir()
        for file in files_below(folder / subfolder)
        if file.name.endswith(suffix)
    ]
