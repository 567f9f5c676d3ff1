"""UserError, for mistakes that a user can correct, and the texts of other exceptions."""

import os
import re
from typing import Any

# The operating system's reasons for refusing a file, which libraries repeat inside their messages.
_SYSTEM_REASONS = (
    "No space left on device|Permission denied|Read-only file system|quota exceeded|"
    "not a directory|File exists"
)


class UserError(Exception):
    """An error that the user can correct.

    The message is one sentence that names the file or key and says what to do. The command line
    prints it without a traceback and exits with a nonzero status.

    Attributes:
        code: identifies the kind of error, in kebab case, such as "mask-values-unknown". Each kind
            has a code of its own, which stays when the sentence is reworded.
        in_every_process: whether all processes of a run raise it at the same place, so that they
            may go on together; otherwise the others wait for this one.
    """

    def __init__(self, sentence: str, *, code: str = "", in_every_process: bool = False) -> None:
        super().__init__(printable(sentence))
        self.code = code
        self.in_every_process = in_every_process


def printable(text: str) -> str:
    """Returns a text that UTF-8 can encode; bytes of file names that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, at most 200 characters.

    Returns the name of its type if the message is empty, as in AssertionError and MemoryError.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def reason(error: BaseException) -> str:
    """Returns why a file cannot be read or written: the system's reason if it is known."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    match = re.search(_SYSTEM_REASONS, str(error), re.IGNORECASE)
    return match.group() if match else first_line(error)


def write_error(path: str | os.PathLike[Any], error: BaseException) -> UserError:
    """Returns the UserError for a file or folder that cannot be written."""
    return UserError(
        f"{path} cannot be written ({reason(error)}): free space or give another folder, and "
        "start again.",
        code="path-unwritable",
    )


def read_error(path: str | os.PathLike[Any], error: BaseException, remedy: str) -> UserError:
    """Returns the UserError for an existing file or folder that cannot be read.

    Args:
        path: path of the file or folder.
        error: the exception that reading raised.
        remedy: what the user can do, such as "make it readable".
    """
    return UserError(
        f"{path} cannot be read ({reason(error)}): {remedy}.",
        code="path-unreadable",
    )
