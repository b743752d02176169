"""Parquet tables of interactions; all files of a folder have the same types."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_columns
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.reading.columns import checked_batch
from ilrec_dist.data.reading.parquet_file import open_parquet, parquet_batches
from ilrec_dist.data.reading.source import Format, Rejects, Source
from ilrec_dist.data.reading.table_files import (
    KEYS,
    SETTINGS,
    interaction_files,
    item_files,
    role_columns,
    table_source,
)
from ilrec_dist.data.reading.times import Times

ENDINGS = (".parquet",)
UNIT = "as in the file; milliseconds for dates and timestamps, thousandths for decimal numbers"


def parquet_files(config: DataConfig) -> list[Path]:
    """The interactions file, or all of a folder, and the item table."""
    return interaction_files(config, ENDINGS) + item_files(config)


def read_parquet(config: DataConfig) -> Source:
    """Ids are strings or integers, times integers, decimal numbers, dates or
    timestamps.
    """
    files, columns = interaction_files(config, ENDINGS), role_columns(config)
    _check_types(files, list(columns.values()))
    return table_source(config, files, partial(_batches, columns=columns), UNIT)


def _check_types(files: list[Path], names: list[str]) -> None:
    """Refuse columns whose type differs between the files.

    Ids that are numbers in one file and text in another would be two ids; times in two
    units would be in no order.
    """
    first = open_parquet(files[0]).schema_arrow
    for path in files[1:]:
        schema = open_parquet(path).schema_arrow
        for name in names:
            if name not in first.names or name not in schema.names:
                continue
            if schema.field(name).type != first.field(name).type:
                raise UserError(
                    f"{path}: column {name!r} is {schema.field(name).type}, "
                    f"but {first.field(name).type} in {files[0].name}; make them one type"
                )


def _batches(path: Path, rejects: Rejects, columns: dict[str, str]) -> Iterator[pa.RecordBatch]:
    file = open_parquet(path)
    wanted = {name: KEYS[role] for role, name in columns.items()}
    require_columns(path, wanted, file.schema_arrow.names)
    times = Times() if "time" in columns else None
    first = 1
    for batch in parquet_batches(path, file, list(columns.values())):

        def rows(within: np.ndarray, first: int = first) -> list[int]:
            numbers: list[int] = (within + first).tolist()
            return numbers

        by_role = {role: batch.column(name) for role, name in columns.items()}
        yield checked_batch(path, by_role, times, rejects, rows, "row")
        first += batch.num_rows


FORMAT = Format(read_parquet, parquet_files, settings=SETTINGS)
