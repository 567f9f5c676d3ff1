"""One run at a time in a workdir: two would write over each other's checkpoints."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator

from etils import epath

from semiseg_jax import distributed
from semiseg_jax.data.labels import has_rename
from semiseg_jax.errors import UserError, unwritten

FILE = ".lock"
# What file systems without such locks say; on them, as in stores such as gs://, nothing is locked.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def held(workdir: epath.PathLike) -> Iterator[None]:
    """Keeps other runs out of a workdir while it lasts; of several processes, the first does.

    The system lets go of the lock however the process ends, so that a file which a killed one left
    does not matter.

    Raises:
        UserError: another run is in it, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if has_rename(workdir):
            folder = os.fspath(workdir)
            distributed.agree("workdir locked", lambda: stack.enter_context(_locked(folder)))
        yield


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    is_new = not os.path.exists(folder)
    path = os.path.join(folder, FILE)
    try:
        file = _take(folder, path)
    except OSError as error:
        raise unwritten(path, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # Still locked: afterwards it may be another run's.
        os.close(file)
        if is_new:
            # A run that could not start leaves nothing.
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _take(folder: str, path: str) -> int:
    """The open lock file, locked, with this process's number and host in it."""
    while True:
        os.makedirs(folder or ".", exist_ok=True)
        # Closed in programs that this one starts; nothing here forks without that.
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(folder, file)
            if _is_at(path, file):
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()} {socket.gethostname()}\n".encode())
                return file
        except BaseException:
            os.close(file)
            raise
        # The run that had it removed it in between.
        os.close(file)


def _lock(folder: str, file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        process, _, host = os.read(file, 300).decode(errors="replace").strip().partition(" ")
        by = f"process {process} on {host}" if host else "another process"
        raise UserError(
            f"The workdir {folder} is in use by {by}: wait until it has ended, or end it, or give "
            "another --workdir."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _is_at(path: str, file: int) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
