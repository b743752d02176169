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


class NotWritable(Exception):
    """Nothing can be written: the disk is full or read-only, or not this user's, or
    another process holds the place. Exit code 1.

    The message is one line that names the path and says what to do.
    """


class Stopped(Exception):
    """A worker ends early because it was asked to, with all that it did saved."""
