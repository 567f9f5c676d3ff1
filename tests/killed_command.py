"""A command that gets a signal at a named write: python -m tests.killed_command …

    python -m tests.killed_command SIGNAL PATTERN COUNT COMMAND ARGUMENTS …

COMMAND is a module of semiseg_jax, such as predict. After the COUNT-th rename to a path that the
regular expression PATTERN matches, the process sends itself the signal, such as SIGKILL. With
"before" in place of COUNT it does so before the first such rename. Not a test by itself; see
test_ends_slow.py.
"""

import itertools
import os
import re
import runpy
import signal
import sys

from tests import FAST_COMPILATION

os.environ["XLA_FLAGS"] = FAST_COMPILATION


def signal_at(number, pattern, count):
    """Sends this process a signal at a rename."""
    # Threads write, and a counter that they share counts each match once.
    matches = itertools.count(1)

    def wrap(method):
        def renamed(source, target):
            is_match = re.search(pattern, os.fspath(target)) and (
                next(matches) == (1 if count == "before" else int(count))
            )
            if is_match and count == "before":
                os.kill(os.getpid(), number)
            result = method(source, target)
            if is_match:
                os.kill(os.getpid(), number)
            return result

        return renamed

    os.replace, os.rename = wrap(os.replace), wrap(os.rename)


if __name__ == "__main__":
    name, pattern, count, command, *arguments = sys.argv[1:]
    # Tests may run under nohup, which has their processes ignore it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal_at(signal.Signals[name], pattern, count)
    sys.argv = [command, *arguments]
    runpy.run_module(f"semiseg_jax.{command}", run_name="__main__")
