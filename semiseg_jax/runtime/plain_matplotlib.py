"""Matplotlib, the same whatever the environment and the settings files of the user say.

$MPLBACKEND names a backend of the program that set it: a shell opened in Jupyter has one that is
not installed elsewhere, and then Matplotlib cannot be imported. This package draws into files,
for which no backend is needed. Every module that plots imports `figure` from here.
"""

import contextlib
import os
from collections.abc import Iterator

_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib import figure
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend

__all__ = ["default_style", "figure"]

# Without the backend, which belongs to the program that plots into windows.
_DEFAULTS = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """Has plots drawn with Matplotlib's defaults; usable as a context and as a decorator.

    Texts are shown as they are: a class may be named "$x$", which would be a formula.
    """
    with matplotlib.rc_context({**_DEFAULTS, "text.parse_math": False}):
        yield
