"""CSV and Parquet tables of interactions, and the item table that may go with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from ilrec_dist.config import DataConfig
from ilrec_dist.data.files import require_columns, require_file
from ilrec_dist.data.readers.columns import Times, checked_batch
from ilrec_dist.data.readers.delimited import Dialect, read_delimited
from ilrec_dist.data.readers.source import Rejects, Source
from ilrec_dist.errors import UserError

BATCH_ROWS = 1_000_000
KEYS = {"user": "data.user_column", "item": "data.item_column", "time": "data.time_column; null means: rows are in chronological order"}


def table_files(config: DataConfig) -> list[Path]:
    """The interactions file and the item table."""
    files = [require_file(config.path or "", "data.path")]
    return files + ([require_file(config.items_path, "data.items_path")] if config.items_path else [])


def read_csv(config: DataConfig) -> Source:
    """A CSV file with a header line (.tsv: tab-separated; .gz: unpacked on the way); ids are taken as text."""
    path = table_files(config)[0]
    dialect = Dialect("\t" if path.name.removesuffix(".gz").endswith(".tsv") else ",")
    return Source(
        path,
        timed=config.time_column is not None,
        batches=lambda rejects: read_delimited(path, _columns(config), KEYS, dialect, rejects),
        item_table=lambda: read_item_table(config),
        timestamp_unit="as in the file; milliseconds for dates, thousandths for decimal numbers",
    )


def read_parquet(config: DataConfig) -> Source:
    """A Parquet file; ids are strings or integers, times integers, decimal numbers, dates or timestamps."""
    path = table_files(config)[0]
    return Source(
        path,
        timed=config.time_column is not None,
        batches=lambda rejects: _parquet_batches(path, _columns(config), rejects),
        item_table=lambda: read_item_table(config),
        timestamp_unit="as in the file; milliseconds for dates and timestamps, thousandths for decimal numbers",
    )


def _columns(config: DataConfig) -> dict[str, str]:
    columns = {"user": config.user_column, "item": config.item_column}
    return columns if config.time_column is None else {**columns, "time": config.time_column}


def _parquet_batches(path: Path, columns: dict[str, str], rejects: Rejects) -> Iterator[pa.RecordBatch]:
    file = open_parquet(path)
    require_columns(path, {name: KEYS[role] for role, name in columns.items()}, file.schema_arrow.names)
    times = Times() if "time" in columns else None
    first = 1
    batches = file.iter_batches(BATCH_ROWS, columns=list(columns.values()))
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: damaged after row {first - 1}: {str(error).splitlines()[0]}") from None

        def rows(within: np.ndarray, first: int = first) -> list[int]:
            return (within + first).tolist()

        yield checked_batch(path, {role: batch.column(name) for role, name in columns.items()}, times, rejects, rows, "row")
        first += batch.num_rows


def open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=8 << 20, pre_buffer=False)  # pre-buffered, all that was read would stay in memory
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def read_item_table(config: DataConfig) -> pa.Table | None:
    """`data.items_path` as (id, title, text): a CSV or Parquet table with columns item, title and, if wanted, text."""
    if config.items_path is None:
        return None
    path = require_file(config.items_path, "data.items_path")
    if path.name.endswith(".parquet"):
        table = open_parquet(path).read()
    else:
        delimiter = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
        try:
            # Everything as text: an id such as 007 must stay what it is.
            names = pacsv.open_csv(path, parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)).schema.names
            types = dict.fromkeys(names, pa.string())
            table = pacsv.read_csv(
                path, parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True), convert_options=pacsv.ConvertOptions(column_types=types)
            )
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: malformed CSV: {str(error).splitlines()[0]}") from None
    require_columns(path, {"item": "data.items_path", "title": "data.items_path"}, table.column_names)
    ids = table.column("item").cast(pa.string()).combine_chunks()
    repeated = pc.filter(counts := pc.value_counts(ids), pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise UserError(f"{path}: item {repeated[0]['values'].as_py()!r} has {repeated[0]['counts'].as_py()} rows, expected one")
    text = table.column("text").cast(pa.string()) if "text" in table.column_names else pa.chunked_array([pa.nulls(len(ids), pa.string())])
    return pa.table({"id": ids, "title": table.column("title").cast(pa.string()), "text": text})
