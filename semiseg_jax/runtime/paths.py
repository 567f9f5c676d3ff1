"""Paths of data sets and of the cache for derived data."""

import os
from typing import Any

from etils import epath

from semiseg_jax.runtime.errors import UserError


def cache_dir(data_config: Any) -> epath.Path:
    """Returns the cache folder: `data.cache_dir`, $SEMISEG_CACHE or ~/.cache/semiseg_jax."""
    return default_cache_dir(data_config.cache_dir)


def default_cache_dir(folder: str = "") -> epath.Path:
    """Returns the cache folder for programs without a config: `folder` or the default."""
    folder = folder or os.environ.get("SEMISEG_CACHE", "")
    return epath.Path(folder or "~/.cache/semiseg_jax").expanduser()


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
    default = epath.Path(base) / name if base else epath.Path("data") / name
    root = epath.Path(data_config.root).expanduser() if data_config.root else default
    if not root.is_dir():
        raise UserError(
            f"The data folder {root} is missing: {where_to_get_it}, then give its place with "
            "--config.data.root=….",
            code="data-folder-missing",
        )
    return root
