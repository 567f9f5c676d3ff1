"""Multi-process runs: starting them, sharding work, exchanging values and ending together.

Each process reads and labels its shard. Process 0 alone writes shared files; it also reads the
workdir and broadcasts the result, so that all processes take the same path. In a single-process
run nothing is started, and every function returns its trivial result.
"""

import contextlib
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np

from semiseg_jax.runtime import coordination
from semiseg_jax.runtime.errors import UserError, first_line

T = TypeVar("T")

# Timeouts in seconds: for all processes to start (machines boot one by one), for process 0 to
# prepare data, and for JAX's heartbeats, after which JAX aborts all processes.
START_SECONDS = 300
PREPARE_SECONDS = 24 * 3600
LOST_SECONDS = 40

_client: coordination.Client | None = None


def process_index() -> int:
    """Returns the index of this process; 0 in a single-process run."""
    return _client.index if _client else 0


def process_count() -> int:
    """Returns the number of processes."""
    return _client.count if _client else 1


def is_main() -> bool:
    """Returns whether this is process 0, which writes shared files and prints progress."""
    return process_index() == 0


def local_shard(items: Sequence[T]) -> Sequence[T]:
    """Returns this process's shard: every `process_count()`-th item, from `process_index()` on."""
    return items[process_index() :: process_count()]


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, on_cpu: bool
) -> None:
    """Joins the other processes of the run, if there are any. Call it before JAX's backend starts.

    Args:
        coordinator: HOST:PORT of process 0. Where this and the next two are None, a Cloud TPU pod
            or a Slurm step supplies them; elsewhere the run has a single process.
        num_processes, process_id: the number of processes and the index of this one.
        on_cpu: whether JAX computes on the CPU.

    Raises:
        UserError: the arguments contradict each other, or the processes cannot connect.
    """
    import jax

    if coordinator is None and num_processes is None and process_id is None:
        # JAX detects the cluster, but only in a Slurm step of several tasks or beside a TPU chip:
        # where libtpu is installed just to compile (see `plan`), JAX would wait for a metadata
        # server. On import JAX sets jax_platforms to "tpu,cpu" where it finds a chip.
        tasks = _slurm_tasks()
        platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
        if tasks > 1:
            _join("the cluster's coordinator", {"num_processes": tasks}, on_cpu)
        elif "tpu" in platforms.split(","):
            _join("the cluster's coordinator", {}, on_cpu)
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            "--coordinator, --num_processes and --process_id belong together: give all three, or "
            "none for a single process, a TPU pod or a Slurm step.",
            code="cluster-flags-incomplete",
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(
            f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:8476.",
            code="coordinator-malformed",
        )
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} is not one of --num_processes={num_processes}: number the "
            "processes from 0.",
            code="process-id-out-of-range",
        )
    address: dict[str, Any] = {"coordinator_address": coordinator, "num_processes": num_processes}
    address |= {"process_id": process_id, "cluster_detection_method": "deactivate"}
    _join(coordinator, address, on_cpu)


def _slurm_tasks() -> int:
    """Returns the number of tasks of the Slurm step that this process is in, 1 outside of one.

    SLURM_NTASKS may be that of the whole job: the shell of an interactive job is a step of one task
    in a job of several, and waits for nobody.
    """
    if "SLURM_STEP_NODELIST" not in os.environ:
        return 1
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    return int(tasks) if re.fullmatch(r"\d{1,9}", tasks) else 1


def _join(where: str, address: dict[str, Any], on_cpu: bool) -> None:
    """Initialises jax.distributed, the listener for events and the collectives."""
    global _client
    import jax

    if on_cpu:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # `multihost_utils.reached_preemption_sync_point` holds Python's lock for minutes beside a dead
    # process, and its signal handler would replace that of `preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    coordination.exit_when_aborted(
        1,
        f"Not all processes of this run came to {where} within {START_SECONDS} s: check its "
        "address, that process 0 runs there, and that all were started with the same number of "
        "processes.",
    )
    try:
        jax.distributed.initialize(
            **address,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=LOST_SECONDS,
        )
    except ValueError as error:
        if address or "defined" not in str(error):
            raise  # Otherwise JAX detected no cluster.
    except RuntimeError as error:
        raise UserError(
            f"The processes of this run cannot join each other at {where} "
            f"({first_line(error)}): check its address and that its port is free.",
            code="cluster-unreachable",
        ) from error
    client = coordination.Client() if jax.distributed.is_initialized() else None
    if client is None or client.count == 1:
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        return
    coordination.exit_when_aborted(
        1,
        "JAX ended this process, as it does where process 0 or another one is lost (see the lines "
        f"above): {coordination.RESTART}.",
    )
    _client = client
    client.listener.start()
    barrier("start")


def connect_devices() -> None:
    """Connects the devices of all processes, which happens in their first common computation.

    On CPUs (gloo) they wait at most 30 s for each other there, less than compiling a program may
    take where another process loads it from the cache. Once connected, they wait half an hour.
    """
    if _client is None:
        return
    import jax
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    # All devices, as in training; then the n-th device of each process, as in orbax.
    mesh = jax.make_mesh((jax.device_count(),), ("device",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("device"))
    ones = jax.jit(lambda: jax.numpy.ones(mesh.size), out_shardings=sharding)()
    ones.sum().block_until_ready()
    multihost_utils.sync_global_devices("connected")


def all_gather(name: str, value: Any) -> list[Any]:
    """Returns the values of all processes, in order; a value is anything that JSON can hold.

    Args:
        name: names the place in the run, alike in all processes.
        value: the value of this process.

    Raises:
        UserError: a process did not come in time.
    """
    return _client.exchange(name, value) if _client else [value]


def barrier(name: str, seconds: float = coordination.BARRIER_SECONDS) -> None:
    """Waits until all processes are here, at most for `seconds`; otherwise as `all_gather`."""
    if _client:
        _client.exchange(name, None, seconds)


def all_gather_shards(name: str, part: Sequence[T]) -> list[T]:
    """Returns the sequence whose shards (see `local_shard`) the processes pass."""
    shards = all_gather(name, list(part))
    items: list[Any] = [None] * sum(map(len, shards))
    for i, shard in enumerate(shards):
        items[i :: len(shards)] = shard
    return items


def broadcast_from_main(name: str, decide: Callable[[], T]) -> T:
    """Returns on every process what `decide` returns, or raises its UserError, on process 0.

    All decisions that depend on files of the workdir are made this way, because files may change
    while several processes look at them. Values and errors as in `all_gather`.
    """
    decision, error = None, None
    if is_main():
        try:
            decision = decide()
        except UserError as raised:
            error = raised
    message = (str(error), error.code) if error else None
    decision, message = all_gather(name, (decision, message))[0]
    if message is not None:
        sentence, code = message
        raise UserError(
            sentence,
            code=code,
            in_every_process=True,
        ) from error
    return decision


def all_reduce_sum(name: str, counts: np.ndarray) -> np.ndarray:
    """Returns the sum of an integer array over the processes, in its shape, int64."""
    return np.sum([np.asarray(c, np.int64) for c in all_gather(name, counts.tolist())], axis=0)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """Runs the body in process 0 first, then in the others, which find its files."""
    if not is_main():
        barrier(name, PREPARE_SECONDS)
    yield
    if is_main():
        barrier(name, PREPARE_SECONDS)


def agree_to_stop(requested: Callable[[], bool]) -> Callable[[], bool]:
    """Returns a function that tells at each call whether to stop there, alike in all processes.

    Every process must call it equally often.

    Args:
        requested: returns whether this process received a request to stop; one request stops all.
    """
    if _client is None:
        return requested
    _client.stop_requested = requested
    return _client.should_stop


@contextlib.contextmanager
def fail_together(agreed: Mapping[type[BaseException], int]) -> Iterator[None]:
    """Ends all processes when an exception ends one of them; otherwise they end at the same time.

    Args:
        agreed: exceptions that all processes raise at the same place, each with the exit status
            of the command.
    """
    outcome = None
    try:
        try:
            yield
        except tuple(agreed) as error:
            outcome = error
        barrier("end")
    except BaseException as error:
        if _client is not None:
            _fail(_client, error)
        raise
    if _client is not None:
        _leave(_client, agreed[type(outcome)] if outcome else 0)
    if outcome:
        raise outcome


def _leave(client: coordination.Client, status: int) -> None:
    """Disconnects from the other processes; nothing changes the exit status any more."""
    import jax

    # JAX aborts the other processes if process 0 exits first. They must be prepared for that.
    coordination.exit_when_aborted(status, "")
    with contextlib.suppress(jax.errors.JaxRuntimeError, UserError):
        barrier("leave", coordination.LEAVE_SECONDS)
        if is_main():
            client.publish("leave")
        client.listener.join(coordination.LEAVE_SECONDS)
        jax.distributed.shutdown()


def _fail(client: coordination.Client, error: BaseException) -> NoReturn:
    """Publishes an error; the listeners then end this process and all others."""
    import jax

    # A launcher that notices the first exit may send SIGTERM before the error is printed.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if isinstance(error, jax.errors.JaxRuntimeError):
        time.sleep(LOST_SECONDS + 5)  # Collectives fail beside a lost process: JAX aborts first.
    sentence = str(error)
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        sentence = f"{type(error).__name__}: {first_line(error)}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.publish("error", sentence)
        client.listener.join()
    # Process 0 may have ended before it answered that the error is published.
    coordination.exit_now(1, client.describe_own_error(sentence))
