"""The one console that the driver speaks through."""

from rich.console import Console

console = Console()
