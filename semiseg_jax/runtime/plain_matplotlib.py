"""Matplotlib with its defaults, whatever the environment and the user's settings files say.

$MPLBACKEND names a backend of the program that set it: a shell opened in Jupyter has one that is
not installed elsewhere, and then Matplotlib cannot be imported. This package draws into files,
for which no backend is needed. Every module takes Matplotlib's modules from here.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator

_backend = os.environ.pop("MPLBACKEND", None)
_is_first = "matplotlib" not in sys.modules
try:
    import matplotlib
    from matplotlib import figure, font_manager, ft2font
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
if _backend is not None and _is_first:
    # The backend with which a notebook shows its own pictures, unless it is not installed here.
    with contextlib.suppress(ValueError, ImportError):
        _module = _backend.removeprefix("module://")
        if _module == _backend or importlib.util.find_spec(_module):
            matplotlib.rcParams["backend"] = _backend

__all__ = ["default_style", "figure", "font_manager", "ft2font", "matplotlib"]

# Without the backend, which belongs to the program that plots into windows.
_DEFAULTS = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """Draws plots with Matplotlib's defaults; usable as a context and as a decorator.

    Texts are shown as they are: a class may be named "$x$", which would be a formula.
    """
    with matplotlib.rc_context({**_DEFAULTS, "text.parse_math": False}):
        yield
