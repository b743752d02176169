"""CSV tables of interactions with a header line.

.tsv is tab-separated, .gz is unpacked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.reading.delimited import read_columns, read_delimited
from ilrec_dist.data.reading.item_table import dialect_of
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

ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
UNIT = "as in the file; milliseconds for dates, thousandths for decimal numbers"


def csv_files(config: DataConfig) -> list[Path]:
    """The interactions file, or all of a folder, and the item table."""
    return interaction_files(config, ENDINGS) + item_files(config)


def read_csv(config: DataConfig) -> Source:
    """Ids are taken as text."""
    files, columns = interaction_files(config, ENDINGS), role_columns(config)
    kind = _time_kind(files, columns["time"]) if "time" in columns and len(files) > 1 else None
    return table_source(config, files, partial(_batches, columns=columns, time_kind=kind), UNIT)


def _batches(
    path: Path, rejects: Rejects, columns: dict[str, str], time_kind: str | None
) -> Iterator[pa.RecordBatch]:
    times = Times(time_kind) if "time" in columns else None
    return read_delimited(path, columns, KEYS, dialect_of(path), rejects, times)


def _time_kind(files: list[Path], column: str) -> str | None:
    """How the first time of all files is read, which holds for all of them."""
    times = Times()
    for path in files:
        keys = {column: KEYS["time"]}
        for batch, _ in read_columns(path, [column], keys, dialect_of(path), Rejects(sys.maxsize)):
            times.parse(batch.column(column))
            if times.kind:
                return times.kind
    return None


FORMAT = Format(read_csv, csv_files, settings=SETTINGS)
