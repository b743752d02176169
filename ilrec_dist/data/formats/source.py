"""What every reader hands to `prepare`: interactions as a stream of Arrow batches, and the items' texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from ilrec_dist.common.errors import UserError


@dataclass
class Rejects:
    """Malformed rows: the first beyond `allowed` is an error, those before it are kept for the reject file."""

    allowed: int = 0
    hint: str = (
        "mend it, or tolerate such rows with --max-bad-rows N"  # what to do, where none is allowed
    )
    rows: list[dict[str, str | int]] = field(default_factory=list)

    def add(self, path: Path, line: int, reason: str, text: str = "", unit: str = "line") -> None:
        """Raises UserError naming file and line when no more bad rows are tolerated."""
        if len(self.rows) >= self.allowed:
            raise UserError(
                f"{path}: {unit} {line}: {reason}"
                + (
                    f" (bad row {len(self.rows) + 1}; data.max_bad_rows allows {self.allowed})"
                    if self.allowed
                    else f"; {self.hint}"
                )
            )
        self.rows.append({"file": str(path), unit: line, "reason": reason, "text": text[:1000]})

    def absorb(self, rows: list[dict[str, Any]]) -> None:
        """Add what another process has kept."""
        for row in rows:
            unit = "row" if "row" in row else "line"
            self.add(Path(row["file"]), row[unit], row["reason"], row["text"], unit)


@dataclass(frozen=True)
class Source:
    """One data set in a foreign format.

    batches: yields record batches with the columns user and item (string or integer, no nulls) and, if timed, timestamp (int64),
             in file order.
    item_table: item texts as a table (id, title, text), strings; None where the format has none.
    parts: where the interactions are many files, these in order, and what reads one of them; `batches` reads one after the other.
    """

    main_file: Path  # named in errors about users and items
    timed: bool
    batches: Callable[[Rejects], Iterator[pa.RecordBatch]]
    item_table: Callable[[], pa.Table | None]
    timestamp_unit: str | None = None
    parts: tuple[list[Path], Callable[[Path, Rejects], Iterator[pa.RecordBatch]]] | None = None


def item_rows(ids: list[str], titles: list[str | None], texts: list[str | None]) -> pa.Table:
    """The item table of three equally long lists."""
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "title": pa.array(titles, pa.string()),
            "text": pa.array(texts, pa.string()),
        }
    )
