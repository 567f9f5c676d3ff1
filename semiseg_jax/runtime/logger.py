"""The lines that a run prints to its user: one logger for the whole package.

    from semiseg_jax.runtime.logger import logger, log_prefix

    with log_prefix("[2/6] student 1: "):
        logger.info("500 steps")

Lines go to standard output, in process 0 alone. The prefix belongs to the process, not to a thread:
a run works on one stage at a time, and the threads that it starts log lines of that stage.
"""

import contextlib
import errno
import logging
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from semiseg_jax.runtime import interrupts, multihost
from semiseg_jax.runtime.errors import printable

logger = logging.getLogger("semiseg_jax")

_prefix = ""
_captured: list[str] | None = None


@contextlib.contextmanager
def log_prefix(prefix: str) -> Iterator[None]:
    """Puts `prefix` in front of every line that is logged inside."""
    global _prefix
    before, _prefix = _prefix, prefix
    try:
        yield
    finally:
        _prefix = before


@contextlib.contextmanager
def capture_lines() -> Iterator[list[str]]:
    """Collects the lines that are logged inside in a list, instead of printing them."""
    global _captured
    before, _captured = _captured, []
    try:
        yield _captured
    finally:
        _captured = before


class RunConsole(Console):
    """A console whose closed pipe does not end the process, as a run saves its work before.

    In a notebook it prints text: rich would make an HTML block of each line.
    """

    def __init__(self, **settings: Any):
        super().__init__(force_jupyter=False, **settings)

    def on_broken_pipe(self) -> None:
        """Discards what is printed from now on; rich would exit."""
        interrupts.discard_output(1)


class _ConsoleHandler(logging.Handler):
    """Prints records through rich, which wraps no line and finds standard output at each call."""

    def __init__(self) -> None:
        super().__init__()
        self._console = RunConsole(highlight=False, soft_wrap=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record in process 0, or adds it to the lines that `capture_lines` collects."""
        line = _prefix + record.getMessage()
        if _captured is not None:
            _captured.append(line)
        elif multihost.is_main():
            try:
                self._console.print(line, markup=False)
            except OSError as error:
                # A run goes on if its lines cannot be printed, as after the terminal was closed.
                if error.errno == errno.EIO:
                    interrupts.discard_output(1)


def _make_printable(record: logging.LogRecord) -> bool:
    """Escapes what UTF-8 cannot encode in a record, such as a part of a file's name."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


# absl's handler at the root would print each line a second time, to standard error.
logger.propagate = False
logger.setLevel(logging.INFO)
logger.addFilter(_make_printable)
logger.addHandler(_ConsoleHandler())
