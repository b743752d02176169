"""The one console that the driver speaks through."""

from rich.console import Console

console = Console()
# All that a terminal may take for a command, but for the end of a line and the tabulator.
_CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)]}
_WRITTEN_OUT = {code: text for code, text in _CONTROL.items() if chr(code) not in "\n\t"}


def written_out(text: str) -> str:
    """What strangers wrote, with its control characters as `\\x1b`."""
    return text.translate(_WRITTEN_OUT)


def print_plain(line: str) -> None:
    """Print what strangers wrote: no brackets are
    markup, and no control characters commands.
    """
    console.print(written_out(line), highlight=False, markup=False, soft_wrap=True)
