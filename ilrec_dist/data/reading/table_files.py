"""What CSV and Parquet tables of interactions share.

Their files, columns and source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import pyarrow as pa

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_file
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.reading.item_table import read_item_table
from ilrec_dist.data.reading.source import Rejects, Source

# Role → the key that chose its column, for errors.
KEYS = {
    "user": "data.user_column",
    "item": "data.item_column",
    "time": "data.time_column; null means: rows are in chronological order",
}
# The keys of DataConfig that tables read.
SETTINGS = frozenset({"path", "items_path", "user_column", "item_column", "time_column"})


def interaction_files(config: DataConfig, endings: tuple[str, ...]) -> list[Path]:
    """`data.path`; of a folder the files whose names have one of the
    endings, by name.
    """
    path = Path(config.path or "")
    if not path.is_dir():
        return [require_file(config.path or "", "data.path")]
    files = sorted(
        file for file in path.iterdir() if file.is_file() and file.name.endswith(endings)
    )
    if not files:
        raise UserError(
            f"{path}: no file named *{' or *'.join(endings)} in this folder (data.path)"
        )
    return files


def item_files(config: DataConfig) -> list[Path]:
    """`data.items_path`, where it is set."""
    return [require_file(config.items_path, "data.items_path")] if config.items_path else []


def role_columns(config: DataConfig) -> dict[str, str]:
    """Role (user, item and, where rows have times, time) → column name."""
    columns = {"user": config.user_column, "item": config.item_column}
    if config.time_column is not None:
        columns["time"] = config.time_column
    for role, other in combinations(columns, 2):
        if columns[role] == columns[other]:
            raise UserError(
                f"data.{role}_column and data.{other}_column are both {columns[role]!r}; "
                f"name two columns"
            )
    return columns


def table_source(
    config: DataConfig,
    files: list[Path],
    read_file: Callable[[Path, Rejects], Iterator[pa.RecordBatch]],
    unit: str,
) -> Source:
    """The source of tables that `read_file` reads one at a time; unit: see Source."""
    items = item_files(config)
    return Source(
        files[0] if len(files) == 1 else files[0].parent,
        timed=config.time_column is not None,
        batches=lambda rejects: (batch for file in files for batch in read_file(file, rejects)),
        item_table=lambda: read_item_table(items[0]) if items else None,
        item_file=items[0] if items else None,
        timestamp_unit=lambda: unit,
        parts=(files, read_file),
    )
