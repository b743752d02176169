"""The `ilrec` command: parsing and one file a family of commands."""

from ilrec_dist.cli.main import main

__all__ = ["main"]
