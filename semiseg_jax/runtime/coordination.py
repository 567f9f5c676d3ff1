"""One process as a client of JAX's coordination service, which process 0 hosts.

It exchanges values between the processes and distributes events ("stop", "error") to all of them.
`multihost_utils` cannot replace it: its functions compute on the devices, do not name an absent
process, and cannot run in a second thread beside the training step.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

from semiseg_jax.runtime.errors import UserError

# How long processes wait for each other at a barrier, and before they exit, in seconds.
BARRIER_SECONDS = 1800
LEAVE_SECONDS = 15
_FOREVER_MS = 10**11

RESTART = "start the same command again on all of them to go on"


class Client:
    """Exchanges values and events with the other processes of the run.

    Attributes:
        index, count: the index of this process, and the number of processes.
        listener: the thread that handles events.
        stop_requested: returns whether this process was asked to stop.
    """

    def __init__(self) -> None:
        # Private: nothing public reaches the key-value store and barriers of the coordination
        # service (orbax uses the same client). `jax.process_index` would start the backend before
        # the other processes can be told that this failed.
        from jax._src.distributed import global_state

        self._service: Any = global_state.client
        self.index: int = global_state.process_id
        self.count: int = global_state.num_processes
        self.listener = threading.Thread(target=self._handle_events, daemon=True)
        self.stop_requested: Callable[[], bool] = lambda: False
        self._slots = itertools.cycle(("even", "odd"))
        self._calls = 0
        self._stop_at = sys.maxsize
        # Held while the processes compare their numbers of calls, which must not change meanwhile.
        self._calls_lock = threading.Lock()

    def exchange(
        self, name: str, value: Any, seconds: float = BARRIER_SECONDS, slot: str | None = None
    ) -> list[Any]:
        """Waits for all processes and returns their values in order; anything that JSON can hold.

        Args:
            name: names the place in the run, alike in all processes.
            value: the value of this process.
            seconds: the timeout.
            slot: where the values are stored, for the listener. The main thread alternates between
                two slots: every process has read one before any process writes it again.

        Raises:
            UserError: a process did not come in time.
            jax.errors.JaxRuntimeError: process 0 cannot be reached.
        """
        import jax

        slot = slot or next(self._slots)
        folder = f"semiseg/{slot}/"
        content = zlib.compress(json.dumps(value).encode())
        self._service.key_value_set_bytes(f"{folder}{self.index}", content, allow_overwrite=True)
        try:
            self._service.wait_at_barrier(f"semiseg {slot} {name}", round(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            absent = re.search(r"timed out task names:\s*((?:\d+\s+)+)", str(error))
            if absent is None:
                raise
            raise UserError(
                f"Process {', '.join(absent[1].split())} did not come to the barrier "
                f'"{name}" within {seconds:g} s: look at what it does, end all processes, and '
                f"{RESTART}.",
                code="barrier-timeout",
            ) from error
        values = dict(self._service.key_value_dir_get_bytes(folder))
        return [json.loads(zlib.decompress(values[f"{folder}{i}"])) for i in range(self.count)]

    def publish(self, kind: str, sentence: str = "") -> None:
        """Appends an event to the log that the listeners of all processes read in the same order.

        Args:
            kind: "stop": all processes agree on a call of `should_stop` to stop at. "error": all
                processes exit. "leave": the listeners return.
            sentence: the error.
        """
        number = self._service.key_value_increment("semiseg/events", 1)
        event = json.dumps([kind, self.index, sentence])
        self._service.key_value_set(f"semiseg/event/{number}", event)

    def _handle_events(self) -> None:
        import jax

        with contextlib.suppress(jax.errors.JaxRuntimeError, UserError):
            for number in itertools.count(1):
                event = self._service.blocking_key_value_get(f"semiseg/event/{number}", _FOREVER_MS)
                kind, sender, sentence = json.loads(event)
                if kind == "leave":
                    return
                if kind == "stop":
                    with self._calls_lock:
                        calls = self.exchange("stop", self._calls, slot=f"stop {number}")
                        # The next call of the process that is furthest; the first event counts.
                        self._stop_at = min(self._stop_at, max(calls) + 1)
                if kind == "error":
                    if sender == self.index:
                        sentence = self.describe_own_error(sentence)
                    else:
                        sentence = (
                            f"process {self.index} ends because process {sender} did: {sentence}"
                        )
                    exit_when_aborted(1, sentence)
                    # Process 0 must not exit before the others have read the event.
                    self.exchange("error", None, LEAVE_SECONDS, slot="error")
                    break
        exit_now(*_when_aborted)

    def describe_own_error(self, sentence: str) -> str:
        """Returns the sentence of an error of this process; it names the process unless it is 0."""
        return f"process {self.index}: {sentence}" if self.index else sentence

    def should_stop(self) -> bool:
        """Returns whether the processes agreed to stop at this call; each must call it as often."""
        if self.stop_requested():
            self.stop_requested = lambda: False  # Published once.
            self.publish("stop")
        with self._calls_lock:
            self._calls += 1
            return self._calls >= self._stop_at


def exit_when_aborted(status: int, sentence: str) -> None:
    """Has the process exit this way where JAX aborts it or process 0 cannot be reached.

    JAX aborts a process from a C++ thread as soon as process 0, or the heartbeat of another
    process, is lost. Python's signal handlers run too late for a last sentence, and the client's
    `missed_heartbeat_callback` raises std::bad_cast (jax 0.10.2). A handler that libc sets runs
    in the aborting thread, in time.

    Args:
        status: the exit status.
        sentence: printed to stderr unless it is empty.
    """
    global _when_aborted
    _when_aborted = (status, sentence)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _abort_handler)


def exit_now(status: int, sentence: str) -> NoReturn:
    """Ends the process from any thread; arguments as in `exit_when_aborted`."""
    if not _exiting.acquire(blocking=False):
        time.sleep(60)  # Another thread is ending the process.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os.write(2, f"Error: {sentence}\n".encode() if sentence else b"")
    os._exit(status)


_exiting = threading.Lock()
_when_aborted = (1, "")
# A global, because it must not be collected while libc refers to it.
_abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: exit_now(*_when_aborted))
