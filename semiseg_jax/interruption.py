"""Ending on request: on SIGTERM or SIGINT a run stops where the same command goes on.

Pre-emptible machines are told by SIGTERM some seconds before they go; a person presses Ctrl-C.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from semiseg_jax import distributed

# sysexits.h: a temporary failure, try again.
EXIT_STATUS = 75

# Whether the run is to stop at this point.
Asked = Callable[[], bool]


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """The run stopped on request; all that was done is on disk."""


def never() -> bool:
    """For runs that nobody interrupts."""
    return False


@contextlib.contextmanager
def by_signals() -> Iterator[Asked]:
    """While it lasts, the first SIGTERM or SIGINT is noted; a second one ends the process at once.

    With several processes one of them is enough, and all stop at the same point.

    Yields:
        Tells whether there has been one.
    """
    with _noted() as received:
        yield distributed.stopping(lambda: bool(received))


@contextlib.contextmanager
def _noted() -> Iterator[list[int]]:
    """The signals received; this process's own handlers."""
    signals = (signal.SIGTERM, signal.SIGINT)
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # The system's own handling: it needs no turn of the interpreter, which may be waiting.
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        print(
            f"{signal.Signals(number).name}: stopping as soon as what is under way is saved; once "
            "more to end at once.",
            file=sys.stderr,
            flush=True,
        )

    before = {each: signal.signal(each, note) for each in signals}
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def stop_if(asked: Asked) -> None:
    """Ends the run here if that was asked for.

    Raises:
        Interrupted: it was.
    """
    if asked():
        raise Interrupted
