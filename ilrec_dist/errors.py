"""Errors that are the user's to mend: one line, exit code 2, no traceback."""


class UserError(Exception):
    """Bad input. The message is one line that names the file, row, key or flag, what was expected, and what to do."""
