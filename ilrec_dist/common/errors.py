"""Errors that the command line shows without a traceback."""


class UserError(Exception):
    """Bad input: exit code 2.

    The message is one line that names the file, row,
    key or flag, what was expected, and what to do.
    """


class WorkersFailed(RuntimeError):
    """The worker group failed more often than launch.max_failures allows:
    exit code 1.
    """
