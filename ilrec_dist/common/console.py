"""The one console that the driver speaks through."""

from rich.console import Console

from ilrec_dist.common.terminal import written_out

console = Console()


def print_plain(line: str) -> None:
    """Print the text as it is: no brackets are markup,
    and no control characters of strangers commands.
    """
    console.print(written_out(line), highlight=False, markup=False, soft_wrap=True)
