"""The lock of a workdir excludes a second run, and does not outlive the run that holds it."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from semiseg_jax import workdir
from tests.errors import raises_code

# Holds the lock, and starts a program that outlives it.
HOLDER = """
import subprocess, sys, time
from semiseg_jax import workdir
with workdir.locked(sys.argv[1]):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_the_holder_is_named_and_a_killed_holder_locks_nothing(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    child_id = int(holder.stdout.readline())
    try:
        by = f"process {holder.pid} on {socket.gethostname()}"
        with raises_code("workdir-in-use", by), workdir.locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        assert (tmp_path / workdir.LOCK_FILE).exists()
        with workdir.locked(tmp_path):
            assert (tmp_path / workdir.LOCK_FILE).read_text().startswith(f"{os.getpid()} ")
    finally:
        holder.kill()
        os.kill(child_id, signal.SIGKILL)


def test_the_lock_ends_with_the_run_whether_it_fails_or_succeeds(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), workdir.locked(tmp_path):
            raise error
        assert not list(tmp_path.iterdir())
    with workdir.locked(tmp_path / "new"):
        (tmp_path / "new" / "result").write_text("")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["result"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with workdir.locked(tmp_path), workdir.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_object_stores_are_not_locked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with workdir.locked("gs://bucket/run"), workdir.locked("gs://bucket/run"):
        assert not list(tmp_path.iterdir())


def test_locking_is_repeated_if_the_file_was_removed_meanwhile(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def flock_after_removal(file, operation):
        """The previous holder ends between this run's open and its lock."""
        calls.append(file)
        if len(calls) == 1:
            os.unlink(tmp_path / workdir.LOCK_FILE)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with workdir.locked(tmp_path):
        assert len(calls) == 2
        with raises_code("workdir-in-use"), workdir.locked(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        raises_code("path-unwritable", "file/.lock"),
        workdir.locked(tmp_path / "file"),
    ):
        pass


def link_to(target, path):
    path.symlink_to(target)


def other_name_of(target, path):
    path.hardlink_to(target)


def copy_of(target, path):
    path.write_bytes(target.read_bytes())


def fifo(target, path):
    os.mkfifo(path)


def folder(target, path):
    path.mkdir()


def link_to_nothing(target, path):
    path.symlink_to(path.parent / "nothing")


@pytest.mark.parametrize(
    "put",
    [link_to, other_name_of, copy_of, fifo, folder, link_to_nothing],
    ids=lambda f: f.__name__,
)
def test_a_lock_of_something_else_is_neither_written_nor_removed(tmp_path, put):
    target = tmp_path / "mine.txt"
    target.write_text("keep")
    run = tmp_path / "run"
    run.mkdir()
    put(target, run / workdir.LOCK_FILE)
    with raises_code("lock-of-something-else", "run/.lock"), workdir.locked(run):
        pass
    assert target.read_text() == "keep"
    assert os.path.lexists(run / workdir.LOCK_FILE) and not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("content", ["", "17 host", "17 a host of two words\n"])
def test_a_lock_that_a_killed_run_left_is_taken(tmp_path, content):
    (tmp_path / workdir.LOCK_FILE).write_text(content)
    with workdir.locked(tmp_path):
        pass


def test_a_workdir_that_is_not_utf8_is_refused(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    with raises_code("workdir-not-utf8", "caf"), workdir.locked(os.fsdecode(folder)):
        pass
    assert not os.path.exists(folder)
