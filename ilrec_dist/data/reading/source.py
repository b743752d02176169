"""What a format is, and what its reader hands to `prepare`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow as pa

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import InteractionDataset

# Characters of a bad row that the reject file keeps.
KEPT_CHARACTERS = 1000


@dataclass
class Rejects:
    """Malformed rows.

    Those that `allowed` tolerates are kept, the next one is an error.
    """

    allowed: int = 0
    # What to do about a bad row where none is allowed.
    hint: str = "mend it, or tolerate such rows with --max-bad-rows N"
    rows: list[dict[str, str | int]] = field(default_factory=list)
    # Users that the source names without an interaction.
    users_without_interactions: int = 0

    def add(self, path: Path, line: int, reason: str, text: str = "", unit: str = "line") -> None:
        """Keep a bad row.

        Raises UserError naming file and line when no more are tolerated.
        """
        if len(self.rows) >= self.allowed:
            advice = f"; {self.hint}"
            if self.allowed:
                number = len(self.rows) + 1
                advice = f" (bad row {number}; data.max_bad_rows allows {self.allowed})"
            raise UserError(f"{path}: {unit} {line}: {reason}{advice}")
        row: dict[str, str | int] = {
            "file": str(path),
            unit: line,
            "reason": reason,
            "text": text[:KEPT_CHARACTERS],
        }
        self.rows.append(row)

    def absorb(self, rows: list[dict[str, Any]]) -> None:
        """Add the rows that another process has kept."""
        for row in rows:
            unit = "row" if "row" in row else "line"
            self.add(Path(row["file"]), row[unit], row["reason"], row["text"], unit)


@dataclass(frozen=True)
class Source:
    """One data set in a foreign format."""

    # The file or folder that errors about users and items name.
    main_file: Path
    # Whether the interactions have times.
    timed: bool
    # Yields record batches in file order with the columns user and item (string or integer, no
    # nulls, no blanks around) and, if timed, timestamp (int64).
    batches: Callable[[Rejects], Iterator[pa.RecordBatch]]
    # The items' texts as a table (id, title, text) of strings; None where there is none.
    item_table: Callable[[], pa.Table | None]
    # The file that the items' texts come from.
    item_file: Path | None = None
    # The unit of the times that are kept; asked after reading, when it is known.
    timestamp_unit: Callable[[], str | None] = lambda: None
    # What the user should know of how the files are read; goes to the summary.
    notes: tuple[str, ...] = ()
    # Where the interactions are many files: these in order, and what reads one of them.
    parts: tuple[list[Path], Callable[[Path, Rejects], Iterator[pa.RecordBatch]]] | None = None


class Writer(Protocol):
    """Writes a prepared folder in a format."""

    def __call__(self, prepared: Path, dataset: InteractionDataset, out: Path, name: str) -> None:
        """Write `dataset`, loaded from the folder `prepared`, to NAME.* in the folder
        `out`.

        Raises UserError for what the format cannot hold.
        """


@dataclass(frozen=True)
class Format:
    """A data format: each module of `data.formats` defines one as `FORMAT`."""

    # Opens the files that the configuration names; None where the data are generated.
    read: Callable[[DataConfig], Source] | None
    # The files whose bytes decide whether `prepare` must run again.
    files: Callable[[DataConfig], list[Path]]
    # Exports a prepared folder; None where the format is only read.
    write: Writer | None = None
    # Writes the tables of generated data to a folder; returns the manifest's counts.
    generate: Callable[[DataConfig, Path], dict[str, Any]] | None = None
    # The keys of DataConfig that this format reads besides those that all formats read.
    settings: frozenset[str] = frozenset({"path"})


def load_format(name: str) -> Format:
    """The format of that name.

    Its module is imported now: the configuration needs names only.
    """
    module = importlib.import_module(f"ilrec_dist.data.formats.{name}")
    return cast(Format, module.FORMAT)
