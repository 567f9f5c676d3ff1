import os
import signal
import subprocess
import sys

import pytest

from semiseg_jax.runtime import preemption

TWICE = """
import os, signal, sys
from semiseg_jax.runtime import preemption
number = signal.Signals[sys.argv[1]]
with preemption.install_signal_handlers():
    print(preemption.should_stop())
    os.kill(os.getpid(), number)
    print(preemption.should_stop(), flush=True)
    os.kill(os.getpid(), number)
    print("still here")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_first_signal_is_noted_and_the_second_ends_the_process(name):
    done = subprocess.run([sys.executable, "-c", TWICE, name], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]
    assert done.returncode == -signal.Signals[name]
    assert f"{name}: stopping as soon as the current work is saved" in done.stderr


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.install_signal_handlers():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(preemption.Preempted):
            preemption.raise_if_stopping()
    assert signal.getsignal(signal.SIGTERM) is before
    preemption.raise_if_stopping()
