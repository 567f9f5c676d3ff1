"""The one exception for what a user can cause and mend, and what others' exceptions say."""


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
