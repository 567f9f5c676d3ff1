"""Two runs do not meet in one workdir, and none is kept out of it for longer than it has to be."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from semiseg_jax import lock
from semiseg_jax.errors import UserError

# It starts a program of its own, which outlives it.
HOLDER = """
import subprocess, sys, time
from semiseg_jax import lock
with lock.held(sys.argv[1]):
    other = subprocess.Popen(["sleep", "60"])
    print(other.pid, flush=True)
    time.sleep(60)
"""


def test_another_run_is_named_and_a_killed_one_keeps_nobody_out(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    outlives = int(holder.stdout.readline())
    try:
        by = f"in use by process {holder.pid} on {socket.gethostname()}: wait until it has ended"
        with pytest.raises(UserError, match=by), lock.held(tmp_path):
            pass
        holder.kill()
        holder.wait()
        assert (tmp_path / lock.FILE).exists()
        with lock.held(tmp_path):
            assert (tmp_path / lock.FILE).read_text().startswith(f"{os.getpid()} ")
    finally:
        holder.kill()
        os.kill(outlives, signal.SIGKILL)


def test_it_ends_with_the_run_however_that_ends(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), lock.held(tmp_path):
            raise error
        assert not list(tmp_path.iterdir())
    with lock.held(tmp_path / "new"):
        (tmp_path / "new" / "result").write_text("")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["result"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_runs_go_on_without(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.held(tmp_path), lock.held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_stores_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lock.held("gs://bucket/run"), lock.held("gs://bucket/run"):
        assert not list(tmp_path.iterdir())


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    flock, times = fcntl.flock, []

    def late(file, operation):
        """Another run ends between the opening of its file and this lock."""
        times.append(file)
        if len(times) == 1:
            os.unlink(tmp_path / lock.FILE)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.held(tmp_path):
        assert len(times) == 2
        with pytest.raises(UserError, match="in use"), lock.held(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file/\.lock cannot be written \(.*\): free space or give"),
        lock.held(tmp_path / "file"),
    ):
        pass
