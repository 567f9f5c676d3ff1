"""fitted.json of a workdir: settings that a run chose by itself, so that every start has the same.

A config may leave a setting open, or ask for a run of so many minutes. The first start chooses the
settings, from the images and from the speed of the machine, and writes them to fitted.json with the
values that the config gave and the reason. A later start takes them from there. config.json has the
chosen values.
"""

import functools
from collections.abc import Mapping
from typing import Any

from etils import epath

from semiseg_jax import workdir as workdir_lib
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.errors import UserError, first_line, write_error

FITTED = "fitted.json"


def forget_unless_begun(workdir: epath.PathLike) -> None:
    """Removes fitted.json of a run that was refused before it began, so that it chooses anew.

    Its settings were chosen for a config that may have been corrected since. A run has begun once
    its config.json is written, which is after fitted.json. All processes must call the function.

    Raises:
        UserError: the file cannot be removed.
    """
    folder = epath.Path(workdir)

    def remove() -> None:
        # Where config.json is lost beside stages, `workdir.check_config` says so.
        if (folder / "config.json").exists() or any(True for _ in folder.glob("round_*")):
            return
        try:
            (folder / FITTED).unlink(missing_ok=True)
        except OSError as error:
            raise write_error(folder / FITTED, error) from error

    multihost.broadcast_from_main("settings of a refused start", remove)


def restore(workdir: epath.PathLike, config: Any) -> Any:
    """Returns a copy of a config with the settings that an earlier start chose.

    A setting is taken where the config gives the same value as at that start; where it gives
    another, `workdir.check_config` compares it with config.json. All processes must call the
    function.

    Raises:
        UserError: as `workdir.read_fingerprint`, or the file has a key or value that no config has.
    """
    settings = _share(workdir).get("settings", {})
    config = config.copy_and_resolve_references()
    try:
        given = {key: _to_json(_get(config, key)) for key in settings}
        for key, setting in settings.items():
            if given[key] == setting["given"]:
                _set(config, key, setting["value"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{epath.Path(workdir) / FITTED} does not fit the config ({first_line(error)}): "
            "restore it, or give another --workdir.",
            code="fitted-settings-damaged",
        ) from error
    return config


def record(
    workdir: epath.PathLike,
    config: Any,
    values: Mapping[str, Any],
    reason: str,
    minutes: float | None = None,
) -> Any:
    """Returns a copy of a config with chosen settings, and adds them to fitted.json.

    All processes must call the function; the values of process 0 count.

    Args:
        workdir: path of the workdir.
        config: what was given, with what was chosen before.
        values: by key, such as "train.steps".
        reason: the sentence that the report says of these values.
        minutes: the duration that they were fitted to; None for any other reason.

    Raises:
        UserError: as `workdir.read_fingerprint`, or the file cannot be written.
    """
    chosen, sentence = multihost.broadcast_from_main(
        "fitted settings", lambda: (_to_json(dict(values)), reason)
    )
    content = _share(workdir)
    settings = content.setdefault("settings", {})
    if minutes is not None:
        content["minutes"] = minutes
    config = config.copy_and_resolve_references()
    for key, value in chosen.items():
        # What the config gave, if the key was chosen before, is what the file has.
        given = settings.get(key, {"given": _to_json(_get(config, key))})["given"]
        settings[key] = {"given": given, "value": value, "reason": sentence}
        _set(config, key, value)
    if (chosen or minutes is not None) and multihost.is_main():
        workdir_lib.write_fingerprint(workdir, FITTED, content)
    return config


def read_settings(workdir: epath.PathLike) -> dict[str, Any]:
    """Returns {"given": …, "value": …, "reason": …} by key, for what the run of a workdir chose.

    The values are as in JSON, with lists for tuples. Older code wrote no reason.

    Raises:
        UserError: as `workdir.read_fingerprint`.
    """
    return _read(workdir).get("settings", {})


def read_minutes(workdir: epath.PathLike) -> float | None:
    """Returns the duration that the run of a workdir was fitted to; None if it was to none.

    Raises:
        UserError: as `workdir.read_fingerprint`.
    """
    return _read(workdir).get("minutes")


def _share(workdir: epath.PathLike) -> dict[str, Any]:
    """Returns `_read` of process 0; all processes must call the function."""
    return multihost.broadcast_from_main("fitted settings known", lambda: _read(workdir))


def _read(workdir: epath.PathLike) -> dict[str, Any]:
    """Returns the content of fitted.json, {} without the file."""
    if not (epath.Path(workdir) / FITTED).exists():
        return {}
    return workdir_lib.read_fingerprint(epath.Path(workdir), FITTED) or {}


def _get(config: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _set(config: Any, key: str, value: Any) -> None:
    """Sets a key to a value read from JSON, whose lists stand for tuples."""
    *parts, name = key.split(".")
    setattr(functools.reduce(getattr, parts, config), name, _to_tuples(value))


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return value


def _to_tuples(value: Any) -> Any:
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value
