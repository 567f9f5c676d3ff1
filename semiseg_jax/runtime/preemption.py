"""Stopping on request: after a signal a run stops where the same command can go on.

Preemptible machines send SIGTERM some seconds before they are taken away; a person presses Ctrl-C,
or closes the terminal, which sends SIGHUP.

The request is a property of the process: loops call `should_stop` or `raise_if_stopping` where they
can stop, and no function passes a flag along. Several processes agree on a call and not on a step,
because labelling and evaluation loops stop too and have no step: all processes run the same loops,
so the n-th call is the same place in each of them.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from semiseg_jax.runtime import interrupts, multihost

# EX_TEMPFAIL of sysexits.h: a temporary failure, try again.
EXIT_STATUS = 75


class Preempted(Exception):  # noqa: N818 - nothing is wrong
    """The run stopped on request; all finished work is on disk."""


_condition: Callable[[], bool] | None = None


def should_stop() -> bool:
    """Whether the run is to stop at this point.

    With several processes the answer is the same in all of them, and each must ask equally often.
    """
    return _condition is not None and _condition()


def raise_if_stopping() -> None:
    """Ends the run here if it is to stop.

    Raises:
        Preempted: it is.
    """
    if should_stop():
        raise Preempted


@contextlib.contextmanager
def stop_when(condition: Callable[[], bool]) -> Iterator[None]:
    """Makes `should_stop` return what `condition` returns, until the context ends."""
    global _condition
    before, _condition = _condition, condition
    try:
        yield
    finally:
        _condition = before


@contextlib.contextmanager
def install_signal_handlers() -> Iterator[None]:
    """Stops the run after SIGTERM, SIGINT or SIGHUP, which a closed terminal sends.

    A second SIGTERM or SIGINT ends the process at once. If SIGHUP was ignored when the process
    started, as under nohup, it stays ignored.

    With several processes a signal to one of them is enough, and all stop at the same point.
    """
    with _record_signals() as received, stop_when(multihost.agree_to_stop(lambda: bool(received))):
        yield


@contextlib.contextmanager
def _record_signals() -> Iterator[list[int]]:
    """Installs this process's handlers; yields the list to which they add the signals."""
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if hears_hangup:
            # The shell and the system each send one when a terminal is closed.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        once_more = ""
        if number != signal.SIGHUP:
            # The default action kills the process even while the interpreter is waiting.
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, signal.SIG_DFL)
            once_more = "; once more to end at once"
        sentence = (
            f"{signal.Signals(number).name}: stopping as soon as the current work is saved"
            f"{once_more}.\n"
        )
        try:
            # Not by `print`, which may be interrupted by this handler in the middle of a line.
            os.write(2, sentence.encode())
        except OSError:
            # The terminal is gone, and the next line printed would raise before all is saved.
            interrupts.discard_output(1, 2)

    hears_hangup = interrupts.is_heard(signal.SIGHUP)
    signals = (signal.SIGTERM, signal.SIGINT, *[signal.SIGHUP] * hears_hangup)
    before = {each: signal.signal(each, record) for each in signals}
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
