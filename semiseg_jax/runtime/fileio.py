"""Files: written atomically, read with errors a user can act on."""

import contextlib
import json
import os
import re
from typing import Any, BinaryIO

from etils import epath

from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.errors import read_error, write_error

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
    folder, name = os.path.split(path)
    # On a shared file system, processes of several machines may have the same process id.
    writer = f"{multihost.process_index()}-{os.getpid()}"
    temporary = os.path.join(folder, f".{name}.{writer}.tmp")  # matches _TEMPORARY_NAME
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


def read_json(path: epath.Path, *keys: str) -> Any:
    """Returns the JSON object in a file; None if it is missing, damaged or lacks one of `keys`.

    Raises:
        UserError: the file is not readable.
    """
    try:
        content = json.loads(path.read_text()) if path.exists() else None
        return content if isinstance(content, dict) and content.keys() >= set(keys) else None
    except OSError as error:
        raise read_error(path, error, "make it readable") from error
    except ValueError:
        return None


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
