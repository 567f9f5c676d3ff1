"""Runs that end themselves, as kill -9 does, at a named write.

Writes go to a temporary file, and a rename makes them count. `pattern` is a regular expression for
the path, `phase` where the process ends ("before" the rename, or "after" it), `count` which match
it is. Without them the run goes to its end. On a store without rename, what is written appears
under its own name, and `phase` may be "half", too: of what is written only the first half is.
Not a test by itself; see test_survival_slow.py.
"""

import itertools
import json
import os
import re
import signal
import tempfile
import traceback

from configs import default
from semiseg_jax.runtime import quiet_tensorflow  # noqa: F401

from semiseg_jax import self_training  # isort: skip
import jax
from etils import epath

from semiseg_jax.reporting import page
from semiseg_jax.runtime import fileio, xla
from tests import FAST_COMPILATION
from tests.prepared_process import server


def die_at(pattern, phase, count):
    """Ends the process at a rename."""
    # Threads write, and a counter that they share counts each match once.
    matches = itertools.count(1)

    def wrap(method):
        def renamed(source, target):
            dies = re.search(pattern, os.fspath(target)) and next(matches) == count
            if dies and phase == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = method(source, target)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return renamed

    # Which paths of epath and of pathlib call, too.
    os.replace, os.rename = wrap(os.replace), wrap(os.rename)


def store_without_rename(pattern, phase, count):
    """As `die_at`, at the writes themselves; renames fail."""
    matches = itertools.count(1)

    def wrap(method):
        def written(self, content, *args, **kwargs):
            dies = re.search(pattern, os.fspath(self)) and next(matches) == count
            if dies and phase == "half":
                method(self, content[: len(content) // 2], *args, **kwargs)
            if dies and phase in ("before", "half"):
                os.kill(os.getpid(), signal.SIGKILL)
            result = method(self, content, *args, **kwargs)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return written

    def refuse(self, target):
        raise OSError(f"{self}: there is no rename here")

    fileio.has_rename = lambda path: False
    cls = type(epath.Path("/"))
    cls.replace = cls.rename = refuse
    cls.write_bytes, cls.write_text = wrap(cls.write_bytes), wrap(cls.write_text)


def run(config_path, workdir, pattern=None, phase="", count=1, store=False):
    """Runs Algorithm 1 in a process of its own; its exit status and what it printed.

    Args:
        config_path: of a JSON file with what differs from configs/default.py.
        workdir: of the run.
        pattern: of the path at which the process ends; None for a run to the end.
        phase: "before", "after" or, on a store, "half".
        count: of the match, from 1.
        store: the workdir is on a store without rename.
    """
    with tempfile.NamedTemporaryFile(mode="r") as output:
        process = server().Process(
            target=_run,
            args=(output.name, str(config_path), str(workdir), pattern, phase, count, store),
        )
        process.start()
        process.join(600)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode, output.read()


def _run(output, config_path, workdir, pattern, phase, count, store):
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # One device; JAX reads this when its devices are first needed.
    os.environ["XLA_FLAGS"] = FAST_COMPILATION
    config = default.get_config()
    with open(config_path) as file:
        changes = {k: tuple(v) if isinstance(v, list) else v for k, v in json.load(file).items()}
    config.update_from_flattened_dict(changes)
    if store:
        store_without_rename(pattern or "never", phase, count)
    elif pattern:
        die_at(pattern, phase, count)
    xla.enable_compilation_cache(os.path.join(os.path.dirname(config_path), "compiled"))
    # Drawing the report takes over a quarter of a run's time, and no result follows from it.
    page.write = lambda workdir: []
    # Small programs too: a test starts dozens of these processes.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        self_training.run(config, workdir)
    except BaseException:
        traceback.print_exc()
        raise
