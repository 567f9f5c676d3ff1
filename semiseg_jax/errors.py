"""The one exception for what a user can cause and mend, and what others' exceptions say."""

import os
import re
from typing import Any

# How the system refuses a file, as libraries repeat it within words of their own.
_SYSTEM = (
    "No space left on device|Permission denied|Read-only file system|quota exceeded|"
    "not a directory|File exists"
)


class UserError(Exception):
    """One sentence that names the file or key and says what to do.

    The command line prints it without a traceback and exits with a status that is not 0.
    """


def first_line(error: BaseException) -> str:
    """What an exception says, for a sentence of ours: one line, at most 200 characters.

    The name of its type where it says nothing, as those of an `assert` or of memory do.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def reason(error: BaseException) -> str:
    """Why a file cannot be read or written: what the system says, where the exception has that."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(_SYSTEM, str(error), re.IGNORECASE)
    return found.group() if found else first_line(error)


def unwritten(path: str | os.PathLike[Any], error: BaseException) -> UserError:
    """The sentence on a file or folder that cannot be written."""
    return UserError(
        f"{path} cannot be written ({reason(error)}): free space or give another folder, and "
        "start again."
    )


def unread(path: str | os.PathLike[Any], error: BaseException, remedy: str) -> UserError:
    """The sentence on a file or folder that is there and cannot be read, and what to do."""
    return UserError(f"{path} cannot be read ({reason(error)}): {remedy}.")
