"""Runs of several processes on this machine, for tests; and what one of them does.

    python -m tests.processes main LOG ARGUMENTS …    the command itself; LOG has what it opened
    python -m tests.processes store PATTERN PHASE COUNT LOG ARGUMENTS …
                                                      the same on a store without rename, killed
                                                      where tests.killed_run would be
    python -m tests.processes step OUT DTYPE BACKBONE one training step of a tiny network
    python -m tests.processes methods OUT             steps of all methods on a toy network

Each is a process of a run where the SEMISEG_ variables say so. Not a test by itself.
"""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests import FAST_COMPILATION
from tests.prepared_process import ROOT, PreparedProcess


def free_port():
    """As launch/local_cluster.sh has it: not of those that outgoing connections take meanwhile."""
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


# Where the tests keep compiled programs, see conftest.py.
CACHE = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def clean_environment():
    """This process's, without what says how runs start; programs are compiled fast, and once."""
    own = ("SEMISEG_", "JAX_")
    kept = {k: v for k, v in os.environ.items() if k in CACHE or not k.startswith(own)}
    return kept | {"XLA_FLAGS": FAST_COMPILATION}


def start(count, devices, arguments, **environment):
    """Starts `count` processes of `devices` devices each: `arguments` are given each one's number.

    They start with JAX and TensorFlow imported, unless they get another PYTHONPATH.

    Args:
        count: of processes; 1 for one that knows of no others.
        devices: of each.
        arguments: from a process's number to what follows python.
        environment: variables to add.
    """
    port = free_port()
    kept = clean_environment() | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    kept |= environment
    started = []
    for i in range(count):
        others = {
            "SEMISEG_COORDINATOR": f"127.0.0.1:{port}",
            "SEMISEG_NUM_PROCESSES": str(count),
            "SEMISEG_PROCESS_ID": str(i),
        }
        variables = kept | (others if count > 1 else {})
        command = list(map(str, arguments(i)))
        if "PYTHONPATH" not in environment:
            started.append(PreparedProcess(command, variables))
            continue
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
    return started


def finish(processes, seconds=900):
    """Waits for all; their statuses and what they printed. None of them outlives this."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            kill(process)
    return [process.returncode for process in processes], outputs


@contextlib.contextmanager
def cluster(count, devices, *arguments):
    """launch/local_cluster.sh with the command's arguments; what it started ends with the test."""
    options = [str(count), f"--devices={devices}", f"--python={sys.executable}"]
    script = subprocess.Popen(
        [ROOT / "launch/local_cluster.sh", *options, "--", *map(str, arguments)],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield script
    finally:
        kill(script)
        script.communicate(timeout=60)


def kill(process):
    """Ends a process, and those of a cluster with it."""
    for pid in members(process).values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()


def kill_member(script, number):
    """Ends one process of a cluster."""
    os.kill(members(script)[number], signal.SIGKILL)


def members(script):
    """The ids of the processes of a cluster that have not ended, by their numbers."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            variables = process.joinpath("environ").read_bytes().decode(errors="replace")
            if parent == script.pid and (number := _NUMBER.search(variables)):
                found[int(number[1])] = int(process.name)
    return found


_NUMBER = re.compile(r"(?:^|\0)SEMISEG_PROCESS_ID=(\d+)\0")


def until(process, text, seconds=600):
    """Reads what a process prints until a line matches the pattern; the match.

    Args:
        process: with its output in a pipe.
        text: a regular expression.
        seconds: after which the process is killed.
    """
    printed = []
    timer = threading.Timer(seconds, kill, [process])
    timer.start()
    try:
        for line in process.stdout:
            printed.append(line)
            if found := re.search(text, line):
                return found
    finally:
        timer.cancel()
    raise AssertionError(f"the run ended without printing {text!r}: {''.join(printed)}")


def until_there(path, process, seconds=600):
    """Waits until a file or folder is there, as long as the process runs."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


def sentence(output):
    """The one sentence that a process ended with."""
    (said,) = re.findall(r"^(?:\[\d+\] )?Error: (.*)$", output, re.M) or [output]
    return said


def run_main(log, *arguments):
    """The command, with a line in `log` for every file that it opens and checkpoint it saves."""
    with open(log, "w", buffering=1) as lines:

        def note(event, details):
            if event == "open" and isinstance(details[0], str | os.PathLike):
                lines.write(f"open {os.fspath(details[0])}\n")

        sys.addaudithook(note)
        from absl import app

        from semiseg_jax import checkpoints, main, self_training
        from semiseg_jax.runtime import cli

        # A slow machine would draw the report, which opens pictures, more often than a fast one.
        self_training.SECONDS_BETWEEN_REPORTS = float("inf")
        save = checkpoints.Checkpoints.save

        def noted(self, step, state):
            lines.write(f"save {step}\n")
            save(self, step, state)

        checkpoints.Checkpoints.save = noted
        sys.argv = ["main", *arguments]
        app.run(main.main, flags_parser=cli.parse_flags_and_config)


def run_on_store(pattern, phase, count, *rest):
    """As `run_main`; ends as kill -9 does at a write whose path matches."""
    from tests import killed_run

    killed_run.store_without_rename(pattern, phase, int(count))
    run_main(*rest)


@contextlib.contextmanager
def process_of_step():
    """A process of a run that computes steps alone, on the devices that it was started with."""
    flags_of_xla = os.environ["XLA_FLAGS"]
    from tests import conftest  # noqa: F401 - it sets eight devices, which are not wanted here

    os.environ["XLA_FLAGS"] = flags_of_xla
    from absl import flags

    from semiseg_jax.runtime import cli

    cli.define_process_flags()
    flags.FLAGS(["step"])
    with cli.exit_on_user_error():
        cli.initialize_multihost(on_cpu=True)
        yield


def own_part(batch, process_index, process_count):
    """The part of the arrays of a global batch that a process has."""
    part = {}
    for name, array in batch.items():
        mine = len(array) // process_count
        part[name] = array[process_index * mine : (process_index + 1) * mine]
    return part


def keep(out, tree):
    """Writes the arrays of a tree, by their paths."""
    import jax
    import numpy as np

    flat = jax.tree_util.tree_leaves_with_path(tree)
    np.savez(out, **{jax.tree_util.keystr(k): np.asarray(v) for k, v in flat})


def run_step(out, dtype, backbone):
    """One student step on a batch whose valid pixels are uneven; process 0 keeps the outcome."""
    with process_of_step():
        import jax
        import numpy as np

        from semiseg_jax import mesh
        from semiseg_jax.runtime import multihost
        from tests.test_train_step import STUDENT, make_batch, make_step

        devices = len(jax.devices())
        batch = make_batch(STUDENT, devices)
        # Device 0 has no valid pixel.
        assert (batch["label"][: len(batch["label"]) // devices // 2] == 255).all()
        head = {"tiny_dinov2": {"model__head": "linear"}}.get(backbone, {})
        network = {"model__backbone": backbone} | head
        step, made, places = make_step(STUDENT, devices, dtype=np.dtype(dtype), **network)
        part = own_part(batch, multihost.process_index(), multihost.process_count())
        made, metrics = step(made, mesh.shard_batch(part, places), jax.random.key(0))
        if multihost.is_main():
            keep(out, (made.params, made.opt_state, metrics))


def run_methods(out):
    """Steps of each method; process 0 keeps the state and the metrics."""
    with process_of_step():
        from semiseg_jax.runtime import multihost
        from tests.methods import test_method_steps, toy_network

        with toy_network.narrow_discriminators():
            outcomes = {
                name: test_method_steps.run_steps(
                    name,
                    2,
                    dtype="float64",
                    share=(multihost.process_index(), multihost.process_count()),
                )
                for name in test_method_steps.ONLINE
            }
        if multihost.is_main():
            keep(out, outcomes)


def events(log, kind):
    """The lines of a log of one kind, without the kind."""
    lines = Path(log).read_text().splitlines()
    return [line.removeprefix(f"{kind} ") for line in lines if line.startswith(f"{kind} ")]


if __name__ == "__main__":
    {"main": run_main, "store": run_on_store, "step": run_step, "methods": run_methods}[
        sys.argv[1]
    ](*sys.argv[2:])
