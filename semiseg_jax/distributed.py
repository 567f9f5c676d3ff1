"""Several processes as one run: how they start, split work, agree, wait for each other and end.

With one process nothing is started, and every function here is the plain thing it says. With
several, each reads and labels its share, process 0 alone writes what there is one of, and what is
read from the workdir is read by process 0 and told to the others, so that all take the same path.
No process outlives another one: each tells the others once a second that it is there, and an error
of one ends all.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np

from semiseg_jax.errors import UserError, first_line

T = TypeVar("T")

# How long processes wait for each other, in seconds: to start (machines come up one by one); at a
# barrier, where all are alive but one is not there; and for the one that prepares data for all.
START_SECONDS = 300
BARRIER_SECONDS = 1800
PREPARE_SECONDS = 24 * 3600
# A process that was not heard of for so long is gone; the rest ends.
LOST_SECONDS = 40
# JAX finds out by its own beats, which come at half of this: never before us, who know which it is.
_HEARTBEAT_SECONDS = 100
_SHUTDOWN_SECONDS = 50
_TICK_SECONDS = 1.0
# So long process 0, through which the others hear of an error, waits for them to have heard.
HEARING_SECONDS = 15

_GO_ON = "start the same command again on all of them to go on"


class _Run:
    """What this process knows of the others.

    Attributes:
        client: of JAX's coordination service, which process 0 hosts.
        index, count: of the processes.
        numbers: of barriers and messages, the same on all processes.
        stop: how they agree on where to stop, where they may be asked to.
    """

    def __init__(self, client: Any, index: int, count: int):
        self.client = client
        self.index = index
        self.count = count
        self.numbers = itertools.count()
        self.stop: _Stop | None = None

    def say(self, word: str, text: str = "") -> None:
        """Has the others know something of this process, under a word."""
        place = f"semiseg/{word}/{self.index}"
        self.client.key_value_set(place, text, allow_overwrite=True)

    def told(self, word: str) -> dict[int, str]:
        """What processes have said under a word, by their numbers."""
        said = self.client.key_value_dir_get(f"semiseg/{word}/")
        return {int(key.rpartition("/")[2]): text for key, text in said}


_run: _Run | None = None


def index() -> int:
    """This process's number; 0 where there is one."""
    return _run.index if _run else 0


def count() -> int:
    """How many processes there are."""
    return _run.count if _run else 1


def is_main() -> bool:
    """Whether this process writes what there is one of, and speaks."""
    return index() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of a sequence; all parts together are the sequence."""
    return items[index() :: count()]


# How they start


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, on_cpu: bool
) -> None:
    """Joins the other processes of the run, if there are any; before JAX's backend has started.

    Args:
        coordinator: HOST:PORT of process 0, or None: then a Cloud TPU pod or a Slurm step is asked
            which processes there are, and without one there is but this process.
        num_processes: how many there are; given with `coordinator`, and so is
        process_id: this one's number.
        on_cpu: the CPU computes.

    Raises:
        UserError: the arguments do not fit together.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        if not _may_be_in_a_cluster():
            return
        where = "the cluster's coordinator"
        arguments: dict[str, Any] = {}
    else:
        _check(coordinator, num_processes, process_id)
        where = f"{coordinator}"
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    _join(where, arguments, on_cpu)


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            "--coordinator, --num_processes and --process_id belong together: give all three, or "
            "none for a single process, a TPU pod or a Slurm step."
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:8476.")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} is not one of --num_processes={num_processes}: number the "
            "processes from 0."
        )


def _may_be_in_a_cluster() -> bool:
    """A Slurm step of several tasks; or a TPU's machine, which may be one of several.

    That libtpu is installed makes none of it: one can compile for TPUs without having any (see
    `plan`), and would have to wait for a metadata server, or for Kubernetes, that are not there.
    """
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return True
    from jax._src import cloud_tpu_init  # which looks for chips as JAX is imported

    platforms = (os.environ.get("JAX_PLATFORMS") or "tpu").split(",")
    return "tpu" in platforms and cloud_tpu_init.running_in_cloud_tpu_vm


def _join(where: str, arguments: dict[str, Any], on_cpu: bool) -> None:
    """Starts jax.distributed and the watch over the others."""
    global _run
    import jax
    from jax._src import distributed as of_jax  # the one way to its client

    if on_cpu:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # see _Stop
    nobody = (
        f"Not all processes of this run came to {where} within {START_SECONDS} s: check its "
        "address, that process 0 runs there, and that all were started with the same number of "
        "processes."
    )
    _when_aborted(lambda: _end(nobody))
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if arguments or "defined" not in str(error):
            raise
        _when_aborted(None)
        return  # JAX found no cluster.
    except RuntimeError as error:
        raise UserError(
            f"The processes of this run cannot join each other at {where} "
            f"({first_line(error)}): check its address and that its port is free."
        ) from error
    state = of_jax.global_state
    if state.num_processes == 1:
        _when_aborted(None)
        return
    aborted = (
        "JAX ended this process, as it does where process 0 or another one is lost (see the lines "
        f"above): {_GO_ON}."
    )
    _when_aborted(lambda: _end(aborted))
    _run = _Run(state.client, state.process_id, state.num_processes)
    _run.say("alive", "0")
    barrier("start")
    threading.Thread(target=_watch, args=(_run,), daemon=True).start()
    _connect()


def _connect() -> None:
    """Has all devices compute together once, now that the processes stand side by side.

    Devices connect in their first computation together, and CPUs (gloo) wait 30 s for each other
    then, and no longer: less than one process may be behind another that takes its programs from
    the cache, while it compiles them on a busy machine. Once connected, they wait half an hour.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    # All devices, as in training; then the n-th of each process, as orbax does.
    mesh = Mesh(np.array(jax.devices()), ("device",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("device"))
    ones = jax.make_array_from_callback((mesh.size,), split, lambda index: np.ones(1, np.int32))
    jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones).block_until_ready()
    multihost_utils.sync_global_devices("connected")


# How they wait and agree


def barrier(name: str, seconds: float | None = None) -> None:
    """Waits until every process is here.

    Args:
        name: of the place in the run, the same on all processes.
        seconds: how long to wait; BARRIER_SECONDS unless given.

    Raises:
        UserError: one did not come.
    """
    if _run is None:
        return
    import jax

    seconds = BARRIER_SECONDS if seconds is None else seconds
    try:
        number = next(_run.numbers)
        _run.client.wait_at_barrier(f"semiseg {number} {name}", round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        missing = re.search(r"timed out task names:\s*((?:\d+\s+)+)", str(error))
        if missing is None:
            raise
        raise UserError(
            f"Process {', '.join(missing.group(1).split())} did not come to the barrier "
            f'"{name}" within {seconds:g} s: look at what it does, end all processes, and '
            f"{_GO_ON}."
        ) from error


def gather(name: str, value: Any) -> list[Any]:
    """The values of all processes, in their order; anything that JSON can say.

    Args:
        name: of the barrier that this is.
        value: of this process.

    Raises:
        UserError: as `barrier`.
    """
    if _run is None:
        return [value]
    place = f"semiseg/gathered/{next(_run.numbers)}/"
    content = zlib.compress(json.dumps(value).encode())
    _run.client.key_value_set_bytes(f"{place}{_run.index}", content)
    barrier(name)
    found = {
        int(key.rpartition("/")[2]): json.loads(zlib.decompress(part))
        for key, part in _run.client.key_value_dir_get_bytes(place)
    }
    return [found[i] for i in range(_run.count)]


def gather_shares(name: str, part: Sequence[T]) -> list[T]:
    """The sequence of which every process has its `share`; its items as in `gather`."""
    parts = gather(name, list(part))
    whole: list[Any] = [None] * sum(map(len, parts))
    for i, of_one in enumerate(parts):
        whole[i :: len(parts)] = of_one
    return whole


def agree(name: str, decide: Callable[[], T]) -> T:
    """What process 0 decides, on every process; anything that JSON can say.

    Whatever depends on the files of the workdir is decided so: they change while others look.

    Args:
        name: of the barrier that this is.
        decide: called in process 0 alone.

    Raises:
        UserError: what `decide` raised, on every process; and as `barrier`.
    """
    decided, refusal = None, None
    if is_main():
        try:
            decided = decide()
        except UserError as error:
            refusal = error
    decided, sentence = gather(name, (decided, refusal and str(refusal)))[0]
    if sentence is not None:
        raise UserError(sentence) from refusal
    return decided


def total(name: str, counts: np.ndarray) -> np.ndarray:
    """The sum of an integer array over the processes, in its shape, int64."""
    return np.sum([np.asarray(part, np.int64) for part in gather(name, counts.tolist())], axis=0)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """Process 0 goes through it first, then all others, who may find its files made."""
    if not is_main():
        barrier(name, PREPARE_SECONDS)
    yield
    if is_main():
        barrier(name, PREPARE_SECONDS)


class _Stop:
    """Has all processes stop at one and the same call, after one of them was asked to.

    JAX has such an agreement too (`multihost_utils.reached_preemption_sync_point`), not used here:
    while it waits for another process, up to three minutes, it keeps Python from running, so that
    a process beside a lost one does not end; and orbax asks it by numbers of steps, which it would
    take for those of our calls.
    """

    def __init__(self, run: _Run, asked: Callable[[], bool]):
        self._run = run
        self._asked = asked
        # Held while the processes compare their numbers of calls, so that these stand still.
        self._lock = threading.Lock()
        self._calls = 0
        self._comparing = False
        self._at: int | None = None

    def __call__(self) -> bool:
        """Whether to stop here."""
        with self._lock:
            self._calls += 1
            return self._calls == self._at

    def look(self) -> bool:
        """Furthers the agreement, again and again in the watch; whether it is under way."""
        if self._at is None and not self._comparing:
            if self._asked():
                self._run.say("asked")
            if self._asked() or self._run.told("asked"):
                self._comparing = self._lock.acquire()
                self._run.say("calls", str(self._calls))
        if self._comparing:
            calls = self._run.told("calls")
            if len(calls) == self._run.count:
                # The next one of the process that is furthest.
                self._at = max(map(int, calls.values())) + 1
                self._comparing = False
                self._lock.release()
        return self._comparing


def stopping(asked: Callable[[], bool]) -> Callable[[], bool]:
    """Tells at each call whether to stop here, where a process was asked to: all the same.

    Every process must call it equally often; the answer is True at one and the same call.

    Args:
        asked: whether this process was.
    """
    if _run is None:
        return asked
    _run.stop = _Stop(_run, asked)
    return _run.stop


# How they end

_speaking = threading.Lock()
_ending = threading.Event()


@contextlib.contextmanager
def together(agreed: Mapping[type[BaseException], int]) -> Iterator[None]:
    """What ends one process inside ends all, each with a sentence; they come to its end together.

    Args:
        agreed: exceptions that all processes raise at the same place, and the status that the
            command then ends with.
    """
    outcome = None
    try:
        try:
            yield
        except tuple(agreed) as error:
            outcome = error
        barrier("end")
    except BaseException as error:
        if _run is not None:
            _end_all(_run, error)
        raise
    _leave(agreed[type(outcome)] if outcome else 0)
    if outcome:
        raise outcome


def _leave(status: int) -> None:
    """All are done, and nothing changes the outcome any more.

    Process 0 may be gone before another one has heard that it may go, too. JAX misses its service
    then, and aborts: the process ends as it would have, without a word. So process 0 goes when all
    are prepared for that, and not before.
    """
    if _run is None:
        return
    import jax

    _ending.set()
    _when_aborted(lambda: _exit(status))
    with contextlib.suppress(jax.errors.JaxRuntimeError, UserError):
        barrier("leave", HEARING_SECONDS)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()


def _end_all(run: _Run, error: BaseException) -> NoReturn:
    """Tells the others why this process ends, and ends it."""
    import jax

    # It ends already, and is to say why: who started the processes may tell it to, now that one is
    # gone, and it would obey without a word.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if isinstance(error, jax.errors.JaxRuntimeError):
        # Collectives fail where another process ended; the watch finds out which, and speaks.
        time.sleep(LOST_SECONDS + 5 * _TICK_SECONDS)
    sentence = str(error)
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        sentence = f"{type(error).__name__}: {first_line(error)}"
    _ending.set()
    run.say("ended", sentence)
    if is_main():
        _wait_until_heard(run)
    _end(sentence if is_main() else f"process {run.index}: {sentence}")


def _wait_until_heard(run: _Run) -> None:
    """The others hear of an error through process 0; those that ended before never do."""
    until = time.monotonic() + HEARING_SECONDS
    others = set(range(run.count)) - {run.index}
    while others and time.monotonic() < until:
        time.sleep(_TICK_SECONDS / 5)
        for word in ("heard", "ended"):
            others -= run.told(word).keys()


def _end(sentence: str) -> NoReturn:
    """Ends the process with one sentence."""
    if not _speaking.acquire(blocking=False):
        time.sleep(60)  # Another thread is at it.
    _exit(1, f"Error: {sentence}\n")


def _exit(status: int, last_words: str = "") -> NoReturn:
    """Ends the process, whatever its other threads are at."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os.write(2, last_words.encode())
    os._exit(status)


def _watch(run: _Run) -> None:
    """Until the run ends: tells the others that this process lives, and ends it when one does."""
    import jax

    seen: dict[int, tuple[str, float]] = {}
    comparing = False
    for beat in itertools.count(1):
        if _ending.wait(_TICK_SECONDS / (10 if comparing else 1)):
            return
        try:
            run.say("alive", str(beat))
            alive, ended = run.told("alive"), run.told("ended")
            if ended:
                run.say("heard")
            comparing = run.stop is not None and run.stop.look()
        except jax.errors.JaxRuntimeError:
            if _ending.is_set():
                return
            _end(f"Process 0 ended or cannot be reached: {_GO_ON}.")
        if run.index in ended:
            return  # The main thread is about to tell it.
        for number, reason in ended.items():
            _end(f"process {run.index} ends because process {number} did: {reason}")
        now = time.monotonic()
        for number, life in alive.items():
            if seen.get(number, ("", 0.0))[0] != life:
                seen[number] = (life, now)
            elif now - seen[number][1] > LOST_SECONDS:
                _end(f"Process {number} was not heard of for {LOST_SECONDS} s: {_GO_ON}.")


def _when_aborted(end: Callable[[], NoReturn] | None) -> None:
    """What ends the process where JAX aborts it, as it does without process 0; None for nothing.

    Python's own handlers run too late for that: the aborting thread calls this one.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    if end is None:
        libc.signal(signal.SIGABRT, int(signal.SIG_DFL))
        return
    handler = _handler_type()(lambda number: end())
    _kept.append(handler)  # As long as the process: it must not be collected.
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


_kept: list[Any] = []


@functools.cache
def _handler_type() -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_int)
