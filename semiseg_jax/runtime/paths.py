"""Paths of data sets and of the cache for derived data, and the home folder in paths."""

import os
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from semiseg_jax.runtime.errors import UserError

# The config keys that hold a path.
PATH_KEYS = (
    *("data.root", "data.cache_dir", "data.image_dir", "data.mask_dir", "data.unlabeled_dir"),
    *("data.labeled_list", "data.unlabeled_list", "data.evaluation_list"),
    *("model.pretrained", "rounds.student_pretrained", "rounds.teacher_from"),
    "eval.unlabeled_masks",
)


def expand_home(path: str) -> str:
    """Returns a path with the home folder in place of a leading ~ or ~USER.

    Shells leave the ~ in --flag=~/folder as it is. A name such as "~old" that is no user is kept.

    Raises:
        UserError: the path begins with ~ alone, and there is no home folder.
    """
    expanded = os.path.expanduser(path)
    if expanded == path and (path == "~" or path.startswith("~/")):
        raise UserError(
            f"{path} cannot be found, because there is no home folder: set HOME, or give the whole "
            "path.",
            code="home-folder-unknown",
        )
    return expanded


def expand_home_in_config(config: Any) -> None:
    """Applies `expand_home` to the PATH_KEYS of a config."""
    for key in PATH_KEYS:
        section, name = key.split(".")
        value = getattr(getattr(config, section, None), name, None)
        if isinstance(value, str) and value.startswith("~"):
            setattr(getattr(config, section), name, expand_home(value))


def cache_dir(data_config: Any) -> epath.Path:
    """Returns the cache folder: `data.cache_dir`, $SEMISEG_CACHE or ~/.cache/semiseg_jax."""
    return default_cache_dir(data_config.cache_dir)


def default_cache_dir(folder: str = "") -> epath.Path:
    """Returns the cache folder for programs without a config: `folder` or the default."""
    folder = folder or os.environ.get("SEMISEG_CACHE", "")
    if folder:
        return epath.Path(expand_home(folder))
    try:
        return epath.Path(Path.home() / ".cache" / "semiseg_jax")
    except RuntimeError:
        # There is no home folder, as for a user of a container whom its system does not know.
        return epath.Path(tempfile.gettempdir()) / f"semiseg_jax-{os.getuid()}"


def data_root(data_config: Any, where_to_get_it: str) -> epath.Path:
    """Returns the folder of the data set: `data.root`, $SEMISEG_DATA/NAME or data/NAME.

    Args:
        data_config: `config.data`; `name` and `root` are read.
        where_to_get_it: instruction for the error message, such as "download …".

    Raises:
        UserError: the folder does not exist.
    """
    name = data_config.name
    base = os.environ.get("SEMISEG_DATA")
    default = epath.Path(expand_home(base)) / name if base else epath.Path("data") / name
    root = epath.Path(expand_home(data_config.root)) if data_config.root else default
    if not root.is_dir():
        raise UserError(
            f"The data folder {root} is missing: {where_to_get_it}, then give its place with "
            "--config.data.root=….",
            code="data-folder-missing",
        )
    return root
