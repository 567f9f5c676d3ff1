"""Ends a command at Ctrl-C with one sentence, from its first moment on.

A command imports JAX and TensorFlow for seconds. An exception in the middle of an import may turn
up as any other error, so the process ends in the signal handler itself. While a run trains or
predicts, the handlers of `preemption` are in place instead. Only the standard library is imported
here, because `semiseg_jax` imports this module before any other of a command.
"""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from types import FrameType

# The exit status that shells give a command after Ctrl-C.
EXIT_STATUS = 128 + signal.SIGINT
# EX_TEMPFAIL of sysexits.h, as `preemption.EXIT_STATUS`, where a machine is taken away.
_STOPPED_STATUS = 75

_SENTENCE = "Interrupted: start the same command again.\n"
# File descriptor that the sentence is written to.
_stderr = 2
# Folders to remove before the process ends.
_scratch_folders: set[str] = set()


def is_heard(number: signal.Signals) -> bool:
    """Returns whether a signal is not ignored; nohup starts processes that ignore SIGHUP."""
    return signal.getsignal(number) is not signal.SIG_IGN


def exit_on_interrupt() -> None:
    """Makes Ctrl-C end the process with a sentence and EXIT_STATUS, instead of a traceback."""
    global _stderr
    # While TensorFlow is imported, standard error is redirected (see `quiet_tensorflow`).
    with contextlib.suppress(OSError):
        _stderr = os.dup(2)
    if is_heard(signal.SIGINT):
        signal.signal(signal.SIGINT, _exit)


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end the process as Ctrl-C does, with exit status 75."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if is_heard(n)]
    before = {number: signal.signal(number, _exit) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def scratch_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Creates a folder for the context, and removes it also where a signal ends the process."""
    folder = os.fspath(path)
    _scratch_folders.add(folder)
    try:
        os.mkdir(folder)
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _scratch_folders.discard(folder)


def discard_output(*descriptors: int) -> None:
    """Redirects file descriptors that nobody can read any more to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    os.close(null)


def _exit(number: int, frame: FrameType | None) -> None:
    """Ends the process: at once, because an exception might be caught or changed on its way."""
    for folder in _scratch_folders:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(_stderr, _SENTENCE.encode())
    os._exit(EXIT_STATUS if number == signal.SIGINT else _STOPPED_STATUS)
