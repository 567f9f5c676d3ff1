"""Config files: finds the shipped ones from any folder, and resolves `configs` inside a config.

Config files say `from configs import default`. Another package of that name may be importable, and
an installed semiseg_jax brings no package of that name. So `configs` is resolved here while a
config file is loaded: to its own folder if that is called configs, to the shipped configs, and
then to other packages of the name.
"""

import contextlib
import difflib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from semiseg_jax.runtime import paths
from semiseg_jax.runtime.errors import UserError

# The name of the shipped configs' folder in paths, and of their package in config files.
_CONFIGS = "configs"
_PACKAGE = Path(__file__).resolve().parents[1]
# The folder in an installed package; pyproject.toml puts the configs there.
_INSTALLED = _PACKAGE / "shipped_configs"


# ---------------------------------------------------------------- paths


def is_installed() -> bool:
    """Returns whether the package was installed, as opposed to imported from its repository."""
    return _INSTALLED.is_dir()


def shipped_folder() -> Path:
    """Returns the folder of the shipped configs: that of the repository, or of the installation."""
    return _INSTALLED if is_installed() else _PACKAGE.parent / _CONFIGS


def shipped_names() -> tuple[str, ...]:
    """Returns the names of the shipped configs, such as "streets", or "methods/NAME"."""
    folder = shipped_folder()
    files = (file for file in folder.rglob("*.py") if not file.stem.startswith("_"))
    return tuple(sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files))


def find(path: str) -> str:
    """Returns the path of a config file, or `path` itself if there is no such file.

    Args:
        path: a file, relative to the working folder; else a shipped config, by its path below
            configs/ or by its name: configs/streets.py, streets.py or streets.
    """
    if os.path.isfile(path):
        return path
    normal = os.path.normpath(path).removeprefix(f"{_CONFIGS}{os.sep}").removesuffix(".py")
    return os.fspath(shipped_folder() / f"{normal}.py") if normal in shipped_names() else path


def find_list(path: str) -> str:
    """Returns the path of a split list, or `path` itself if there is no such file.

    Args:
        path: a file, relative to the working folder; else one of the lists that come with the
            configs, such as configs/splits/camvid/1_30.txt.
    """
    folder, _, name = os.path.normpath(path).partition(os.sep)
    shipped = shipped_folder() / name
    is_shipped = folder == _CONFIGS and not os.path.exists(path) and shipped.is_file()
    return os.fspath(shipped) if is_shipped else path


def default_path() -> str:
    """Returns the path of the file that documents every key: configs/default.py, where it is."""
    usual, shipped = Path(_CONFIGS, "default.py"), shipped_folder() / "default.py"
    return os.fspath(usual if usual.exists() and usual.samefile(shipped) else shipped)


def require(path: str) -> None:
    """Checks that a config file exists.

    Args:
        path: the return value of `find`.

    Raises:
        UserError: it does not; the sentence names similar files and the shipped configs.
    """
    if os.path.isfile(path):
        return
    problem = "is a folder" if os.path.isdir(path) else "is missing"
    candidates = [f"{_CONFIGS}/{name}.py" for name in shipped_names()]
    with contextlib.suppress(OSError):
        candidates += map(os.fspath, Path(path).parent.glob("*.py"))
    by_name: dict[str, list[str]] = {}
    for candidate in candidates:
        by_name.setdefault(Path(candidate).stem.lower(), []).append(candidate)
    names = difflib.get_close_matches(Path(path).stem.lower(), by_name, 2)
    similar = dict.fromkeys(candidate for name in names for candidate in by_name[name])
    hint = f" (did you mean {' or '.join(similar)}?)" if similar else ""
    raise UserError(
        f"The config {path} {problem}{hint}: give the path of your own config file, or a shipped "
        f"config of configs/: {', '.join(shipped_names())}.",
        code="config-file-missing",
    )


# ---------------------------------------------------------------- imports


@contextlib.contextmanager
def resolve_imports(path: str) -> Iterator[None]:
    """Resolves `configs` in import statements as the config file at `path` means it.

    Afterwards, the modules that were imported before as `configs` are back.

    Args:
        path: of the config file that is loaded meanwhile.
    """
    finder = _ConfigsFinder(Path(os.path.abspath(path)).parent)
    imported_before = _take_modules()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _take_modules()
        sys.modules.update(imported_before)


def _take_modules() -> dict[str, types.ModuleType]:
    """Removes `configs` and its modules from the imported modules, and returns them."""
    names = [name for name in sys.modules if re.match(rf"{_CONFIGS}(\.|$)", name)]
    return {name: sys.modules.pop(name) for name in names}


class _ConfigsFinder(importlib.abc.MetaPathFinder):
    """Finds the package `configs` for the config files of a folder."""

    def __init__(self, folder: Path):
        self._own = [folder] if folder.name == _CONFIGS else []
        self._above = [parent for parent in folder.parents if parent.name == _CONFIGS]

    def find_spec(
        self, fullname: str, path: Any, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of `configs`, None for any other module."""
        if fullname != _CONFIGS:
            return None
        first = [*self._own, shipped_folder()]
        # For config files that import another package of this name, or a folder above their own.
        others = [Path(entry or os.curdir, _CONFIGS) for entry in sys.path]
        folders = dict.fromkeys(
            os.path.abspath(folder) for folder in (*first, *self._above, *others) if folder.is_dir()
        )
        for folder in folders:
            # The listing that an earlier import left there may be older than the file.
            sys.path_importer_cache.pop(folder, None)
        (body, *_) = (file for file in (f / "__init__.py" for f in first) if file.is_file())
        return importlib.util.spec_from_file_location(
            _CONFIGS, body, submodule_search_locations=list(folders)
        )


# ---------------------------------------------------------------- configs


def load(config: str) -> Any:
    """Returns the config that a value of --config names, for programs without a command line.

    Args:
        config: as in `find`, with an argument after a colon if there is one:
            "configs/camvid.py:half", "folder", "~/mine.py".

    Raises:
        UserError: the file is missing.
    """
    path, *arguments = config.split(":", 1)
    path = find(paths.expand_home(path))
    require(path)
    return _get_config(path, *arguments)


def default_config() -> Any:
    """Returns the config of configs/default.py, whatever other file of this name there is."""
    return _get_config(os.fspath(shipped_folder() / "default.py"))


def _get_config(path: str, *arguments: str) -> Any:
    """Returns what get_config of a config file returns."""
    loader = importlib.machinery.SourceFileLoader("semiseg_jax_config", path)
    module = types.ModuleType(loader.name)
    module.__file__ = path
    with resolve_imports(path):
        loader.exec_module(module)
        return module.get_config(*arguments)
