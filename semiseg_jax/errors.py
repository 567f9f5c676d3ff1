"""The one exception for what a user can cause and mend."""


class UserError(Exception):
    """One sentence that names the file or key and says what to do.

    The command line prints it without a traceback and exits with a status that is not 0.
    """
