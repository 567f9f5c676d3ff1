import os
import signal
import subprocess
import sys

import pytest

from semiseg_jax import interruption

TWICE = """
import os, signal, sys
from semiseg_jax import interruption
number = signal.Signals[sys.argv[1]]
with interruption.by_signals() as asked:
    print(asked())
    os.kill(os.getpid(), number)
    print(asked(), flush=True)
    os.kill(os.getpid(), number)
    print("still here")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_first_signal_is_noted_and_the_second_ends_the_process(name):
    done = subprocess.run([sys.executable, "-c", TWICE, name], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]
    assert done.returncode == -signal.Signals[name]
    assert f"{name}: stopping as soon as what is under way is saved" in done.stderr


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with interruption.by_signals() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(interruption.Interrupted):
            interruption.stop_if(asked)
    assert signal.getsignal(signal.SIGTERM) is before
    interruption.stop_if(interruption.never)
