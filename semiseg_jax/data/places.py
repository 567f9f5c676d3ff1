"""Where data lies, and where what is derived from it is kept."""

import os
from typing import Any

from etils import epath

from semiseg_jax.errors import UserError


def cache_dir(data_config: Any) -> epath.Path:
    """The folder for derived data: config, $SEMISEG_CACHE, or ~/.cache/semiseg_jax."""
    return usual_cache_dir(data_config.cache_dir)


def usual_cache_dir(named: str = "") -> epath.Path:
    """The folder for derived data that is named, or that there is without a config."""
    named = named or os.environ.get("SEMISEG_CACHE", "")
    return epath.Path(named or "~/.cache/semiseg_jax").expanduser()


def data_root(data_config: Any, where_to_get_it: str) -> epath.Path:
    """The data set's folder, which exists: config, $SEMISEG_DATA/NAME, or data/NAME.

    Args:
        data_config: `config.data`.
        where_to_get_it: what to do first where it is missing; part of the sentence.

    Raises:
        UserError: it is missing.
    """
    name = data_config.name
    base = os.environ.get("SEMISEG_DATA")
    default = epath.Path(base) / name if base else epath.Path("data") / name
    root = epath.Path(data_config.root).expanduser() if data_config.root else default
    if not root.is_dir():
        raise UserError(
            f"The data folder {root} is missing: {where_to_get_it}, then give its place with "
            "--config.data.root=…."
        )
    return root
