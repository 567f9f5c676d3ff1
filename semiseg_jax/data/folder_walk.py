"""The files below a folder: each is listed once, also where symbolic links form a cycle."""

import heapq
import os
from collections.abc import Callable, Hashable

from etils import epath

from semiseg_jax.runtime.errors import read_error


def inside(folder: epath.Path) -> list[epath.Path]:
    """Returns the paths in a folder, sorted by name.

    Raises:
        UserError: the folder is not readable.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise read_error(
            f"The folder {folder}", error, "make it readable, or move it elsewhere"
        ) from error


def walk_files(
    folder: epath.PathLike, skip_folder: Callable[[epath.Path], bool] = lambda folder: False
) -> list[epath.Path]:
    """Returns every file below a folder at any depth, sorted by the components of its path.

    Links to folders are followed, and each folder is visited once, under the path without links
    if it has one below `folder`. Otherwise the files of a folder that links to itself would be
    listed under up to 40 paths, and two such links would never end. A link to a folder that
    contains `folder` forms a cycle too and is not followed. A link without a target is listed as a
    file.

    Args:
        folder: the folder to walk.
        skip_folder: returns whether to skip a nested folder.

    Raises:
        UserError: a folder is not readable.
    """
    files: list[epath.Path] = []
    root = epath.Path(folder)
    visited = {_identity(parent) for parent in epath.Path(os.path.realpath(root)).parents}
    # Links wait until all folders that are reached without them are visited.
    folders, links = [root], list[tuple[tuple[str, ...], epath.Path]]()
    while folders or links:
        if folders:
            current = folders.pop()
        else:
            _, current = heapq.heappop(links)
        identity = _identity(current)
        if identity in visited:
            continue
        visited.add(identity)
        for path in inside(current):
            if not path.is_dir():
                files.append(path)
            elif skip_folder(path):
                continue
            elif os.path.islink(path):
                heapq.heappush(links, (path.parts, path))
            else:
                folders.append(path)
    return sorted(files, key=lambda path: path.parts)


def _identity(folder: epath.PathLike) -> Hashable:
    """Returns what identifies a folder under any of its paths."""
    try:
        status = os.stat(folder)
    except OSError:  # A store such as gs://, which has no links.
        return os.fspath(folder)
    return (status.st_dev, status.st_ino)
