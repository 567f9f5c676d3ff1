"""Files: written atomically, read with errors a user can act on."""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from semiseg_jax.runtime import interrupts, multihost
from semiseg_jax.runtime.errors import read_error, write_error
from semiseg_jax.runtime.json_forms import Form, is_object

# The names of temporary files: .NAME.PROCESS_INDEX-PROCESS_ID.tmp
_TEMPORARY_NAME = re.compile(r"\..+\.\d+-(?P<process_id>\d{1,9})\.tmp")


def has_rename(path: epath.PathLike) -> bool:
    """Returns whether renaming a file at this path is atomic.

    It is on file systems. Stores such as gs:// copy and delete instead, which may stop halfway.
    """
    return "://" not in os.fspath(path)


def write_bytes(path: epath.PathLike, content: bytes, sync: bool = True) -> None:
    """Writes a file atomically: under a temporary name, which is then renamed.

    Stores without rename (see `has_rename`) show a file only when it is complete, so there the
    file is written under its final name.

    Args:
        path: path of the file.
        content: content of the file.
        sync: wait until the file is on disk, so that a power cut leaves the old file or the new
            one. For thousands of small files the wait takes longer than producing them. After a
            power cut files without sync may be empty or truncated, which the reader must detect:
            label maps are verified by their stamp and hash and written again.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        if has_rename(path):
            _write_and_rename(os.fspath(path), content, sync)
        else:
            target = epath.Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    except OSError as error:
        raise write_error(path, error) from error


def _write_and_rename(path: str, content: bytes, sync: bool) -> None:
    """Writes a file on a file system atomically; creates its folder if it is missing.

    Uses few system calls and no path objects: prediction and labelling write thousands of small
    files, and epath doubles the time for each.
    """
    folder = os.path.dirname(path)
    temporary = temporary_name(path)
    try:
        with _create_file(temporary) as file:
            file.write(content)
            if sync:
                # Otherwise the rename may reach the disk before the content.
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if sync:
        # The rename itself is durable when the folder is; some file systems cannot sync folders.
        with contextlib.suppress(OSError):
            descriptor = os.open(folder or ".", os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def temporary_name(path: epath.PathLike) -> str:
    """Returns a path in the same folder, for a file or folder that is renamed once complete."""
    folder, name = os.path.split(os.fspath(path))
    # On a shared file system, processes of several machines may have the same process id.
    writer = f"{multihost.process_index()}-{os.getpid()}"
    return os.path.join(folder, f".{name}.{writer}.tmp")  # matches _TEMPORARY_NAME


def remove_leftover_folders(path: epath.PathLike) -> None:
    """Removes the folders at a `temporary_name` of this path that killed processes left."""
    parent, name = os.path.split(os.fspath(path))
    for entry in os.listdir(parent or "."):
        match = _TEMPORARY_NAME.fullmatch(entry)
        is_of_path = re.fullmatch(rf"\.{re.escape(name)}\.\d+-\d+\.tmp", entry)
        if match and is_of_path and not _is_other_process_alive(int(match["process_id"])):
            shutil.rmtree(os.path.join(parent, entry), ignore_errors=True)


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `path` on success and removed on failure.

    Removes what killed processes left of earlier tries. `path` must not exist or be empty.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftover_folders(path)
    scratch = temporary_name(path)
    with interrupts.scratch_folder(scratch):
        folder = Path(scratch) / path.name
        folder.mkdir()
        yield folder
        folder.rename(path)


def remove_leftovers(folder: epath.PathLike) -> None:
    """Removes temporary files that a killed `write_bytes` left below a folder.

    Skips linked folders, which may belong to another program, and the temporary files of other
    processes that still run on this machine.
    """
    if not has_rename(folder):
        return  # `write_bytes` creates no temporary files there.
    for parent, _, names in os.walk(folder):
        for name in names:
            match = _TEMPORARY_NAME.fullmatch(name)
            if match and not _is_other_process_alive(int(match["process_id"])):
                # A leftover that stays, or that another process has removed, does no harm.
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(parent, name))


def require_regular(path: epath.PathLike) -> None:
    """Raises an OSError for a pipe, socket or device: to open or read it may never end."""
    if not has_rename(path):
        return
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))


def read_text(path: epath.PathLike) -> str:
    """Returns the text of a regular file.

    Raises:
        OSError: it is missing, not readable, or no regular file.
        ValueError: it is not UTF-8.
    """
    require_regular(path)
    return epath.Path(path).read_text()


def read_json(path: epath.Path, form: Form = is_object) -> Any:
    """Returns the JSON value in a file; None if it is missing, damaged or of another form.

    A folder, pipe or device of this name counts as missing.

    Args:
        path: path of the file.
        form: the form that the value must have (see `json_forms`).

    Raises:
        UserError: the file is not readable.
    """
    try:
        # `path.is_file` of epath is true for a pipe.
        is_there = os.path.isfile(path) if has_rename(path) else path.exists()
        content = parse_json(read_text(path)) if is_there else None
    except OSError as error:
        raise read_error(path, error, "make it readable") from error
    except ValueError:
        return None
    return content if form(content) else None


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: the text is no JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _create_file(path: str) -> BinaryIO:
    """Opens a new file for writing; creates its folder if it is missing."""
    try:
        return open(path, "wb")
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, "wb")


def _is_other_process_alive(process_id: int) -> bool:
    if process_id == os.getpid():
        return False  # In a container the killed process may have had the same id.
    try:
        os.kill(process_id, 0)  # Signal 0 only tests whether the process exists.
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
