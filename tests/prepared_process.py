"""Processes that start with JAX and TensorFlow imported, which takes 5 s of CPU time otherwise.

A server imports them once for all tests of a process, and forks. It starts no device and makes no
thread. A process has the interface of `subprocess.Popen` as far as tests use it.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]


def server():
    """The context of multiprocessing whose processes are forked with everything imported."""
    context = multiprocessing.get_context("forkserver")
    # Of the package what defines no flag: scripts define those that they need.
    context.set_forkserver_preload(["tests.killed_run"])
    return context


class PreparedProcess:
    """`python ARGUMENTS` in the repository root; its output is in a pipe.

    Attributes:
        stdout: text, of both standard streams.
        returncode: None while it runs; negative for the signal that ended it.
        pid: of the process.
    """

    def __init__(self, arguments, environment):
        """Starts it.

        Args:
            arguments: -m MODULE or -c SCRIPT, and what follows.
            environment: all variables.
        """
        context = server()
        reader, writer = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(writer, arguments, environment))
        self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
        reader.close()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Waits for the end; the rest of the output, and None as of a stream that is none."""
        printed = []
        reading = threading.Thread(target=lambda: printed.append(self.stdout.read()), daemon=True)
        reading.start()
        reading.join(timeout)
        self.wait(timeout if reading.is_alive() else 60)
        return "".join(printed), None

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _run(writer, arguments, environment):
    """Does what python does with its arguments, and ends as it does."""
    os.dup2(writer.fileno(), 1)
    os.dup2(writer.fileno(), 2)
    writer.close()
    # Those of the server write to its own, of which they may know a position.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    _configure_jax()
    os.chdir(ROOT)
    kind, program, *rest = arguments
    try:
        if kind == "-m":
            sys.argv = [program, *rest]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest]
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _configure_jax():
    """Reads the variables that JAX reads when it is imported."""
    import jax

    for name, value in os.environ.items():
        setting = name.lower()
        if name.startswith("JAX_") and setting in jax.config.values:
            kind = type(jax.config.values[setting])
            parsed = value.lower() in ("1", "true") if kind is bool else kind(value)
            jax.config.update(setting, parsed if kind is not type(None) else value)
