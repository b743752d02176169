"""What strangers wrote, as text that a terminal takes for no command."""

from __future__ import annotations

# All that a terminal may take for a command, the end of a line and the tabulator included.
_CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)]}
_WITHIN_LINES = {code: text for code, text in _CONTROL.items() if chr(code) not in "\n\t"}


def written_out(text: str) -> str:
    """What strangers wrote, with its control characters as `\\x1b`."""
    return text.translate(_WITHIN_LINES)


def one_line(text: str) -> str:
    """`written_out`, with ends of lines and tabulators too."""
    return text.translate(_CONTROL)
