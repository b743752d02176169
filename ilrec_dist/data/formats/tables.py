"""CSV and Parquet tables of interactions, and the item table that may go with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_columns, require_file
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.formats.columns import Times, checked_batch, plain, text_or_null
from ilrec_dist.data.formats.delimited import Dialect, header_names, read_columns, read_delimited
from ilrec_dist.data.formats.source import Rejects, Source

BATCH_ROWS = 1_000_000
SUFFIXES = {
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "parquet": (".parquet",),
}  # of a folder of many files
KEYS = {
    "user": "data.user_column",
    "item": "data.item_column",
    "time": "data.time_column; null means: rows are in chronological order",
}


def table_files(config: DataConfig) -> list[Path]:
    """The interactions file, or all of a folder, and the item table."""
    return interaction_files(config) + (
        [require_file(config.items_path, "data.items_path")] if config.items_path else []
    )


def interaction_files(config: DataConfig) -> list[Path]:
    """`data.path`; of a folder the files of the format, by name."""
    path = Path(config.path or "")
    if not path.is_dir() or config.format not in SUFFIXES:
        return [require_file(config.path or "", "data.path")]
    found = sorted(
        file
        for file in path.iterdir()
        if file.is_file() and file.name.endswith(SUFFIXES[config.format])
    )
    if not found:
        raise UserError(
            f"{path}: no file named *{' or *'.join(SUFFIXES[config.format])} in this folder (data.path)"
        )
    return found


def read_csv(config: DataConfig) -> Source:
    """CSV files with a header line (.tsv: tab-separated; .gz: unpacked on the way); ids are taken as text."""
    files, columns = interaction_files(config), _columns(config)
    kind = _time_kind(files, columns["time"]) if "time" in columns and len(files) > 1 else None
    read_file = partial(_csv_batches, columns=columns, time_kind=kind)
    return _source(
        config,
        files,
        read_file,
        "as in the file; milliseconds for dates, thousandths for decimal numbers",
    )


def read_parquet(config: DataConfig) -> Source:
    """Parquet files; ids are strings or integers, times integers, decimal numbers, dates or timestamps. All of a folder have the same types."""
    files, columns = interaction_files(config), _columns(config)
    _check_types(files, list(columns.values()))
    read_file = partial(_parquet_batches, columns=columns)
    return _source(
        config,
        files,
        read_file,
        "as in the file; milliseconds for dates and timestamps, thousandths for decimal numbers",
    )


def _source(
    config: DataConfig,
    files: list[Path],
    read_file: Callable[[Path, Rejects], Iterator[pa.RecordBatch]],
    unit: str,
) -> Source:
    return Source(
        files[0] if len(files) == 1 else files[0].parent,
        timed=config.time_column is not None,
        batches=lambda rejects: (batch for file in files for batch in read_file(file, rejects)),
        item_table=lambda: read_item_table(config),
        timestamp_unit=unit,
        parts=(files, read_file),
    )


def _csv_batches(
    path: Path, rejects: Rejects, columns: dict[str, str], time_kind: str | None
) -> Iterator[pa.RecordBatch]:
    return read_delimited(path, columns, KEYS, _dialect(path), rejects, time_kind)


def _dialect(path: Path) -> Dialect:
    return Dialect("\t" if path.name.removesuffix(".gz").endswith(".tsv") else ",")


def _time_kind(files: list[Path], column: str) -> str | None:
    """How the first time of all files is read, which holds for all of them."""
    times = Times()
    for path in files:
        for batch, _ in read_columns(
            path, [column], {column: KEYS["time"]}, _dialect(path), Rejects(sys.maxsize)
        ):
            times.parse(batch.column(column))
            if times.kind:
                return times.kind
    return None


def _check_types(files: list[Path], names: list[str]) -> None:
    """Ids that are numbers in one file and text in another would be two ids; times in two units would be in no order."""
    first = open_parquet(files[0]).schema_arrow
    for path in files[1:]:
        schema = open_parquet(path).schema_arrow
        for name in names:
            if (
                name in first.names
                and name in schema.names
                and schema.field(name).type != first.field(name).type
            ):
                raise UserError(
                    f"{path}: column {name!r} is {schema.field(name).type}, but {first.field(name).type} in {files[0].name}; make them one type"
                )


def _columns(config: DataConfig) -> dict[str, str]:
    columns = {
        "user": config.user_column,
        "item": config.item_column,
        **({} if config.time_column is None else {"time": config.time_column}),
    }
    for role, other in combinations(columns, 2):
        if columns[role] == columns[other]:
            raise UserError(
                f"data.{role}_column and data.{other}_column are both {columns[role]!r}; name two columns"
            )
    return columns


def _parquet_batches(
    path: Path, rejects: Rejects, columns: dict[str, str]
) -> Iterator[pa.RecordBatch]:
    file = open_parquet(path)
    require_columns(
        path, {name: KEYS[role] for role, name in columns.items()}, file.schema_arrow.names
    )
    times = Times() if "time" in columns else None
    first = 1
    for batch in parquet_batches(path, file, list(columns.values())):

        def rows(within: np.ndarray, first: int = first) -> list[int]:
            return (within + first).tolist()

        yield checked_batch(
            path,
            {role: batch.column(name) for role, name in columns.items()},
            times,
            rejects,
            rows,
            "row",
        )
        first += batch.num_rows


def parquet_batches(path: Path, file: pq.ParquetFile, names: list[str]) -> Iterator[pa.RecordBatch]:
    """The columns of a Parquet file, BATCH_ROWS at a time. Raises UserError where the file is damaged."""
    batches, passed = file.iter_batches(BATCH_ROWS, columns=names), 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{path}: damaged after row {passed}: {str(error).splitlines()[0]}"
            ) from None
        yield batch
        passed += batch.num_rows


def open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            path, buffer_size=8 << 20, pre_buffer=False
        )  # pre-buffered, all that was read would stay in memory
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}"
        ) from None


def read_item_table(config: DataConfig) -> pa.Table | None:
    """`data.items_path` as (id, title, text): a CSV or Parquet table with columns item, title and, if wanted, text. Ids stay as they are written: 007 is not 7.

    Raises UserError naming the file and the line, row or item.
    """
    if config.items_path is None:
        return None
    path = require_file(config.items_path, "data.items_path")
    table = _parquet_items(path) if path.name.endswith(".parquet") else _csv_items(path)
    ids = table.column("item")
    repeated = pc.filter(counts := pc.value_counts(ids), pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise UserError(
            f"{path}: item {repeated[0]['values'].as_py()!r} has {repeated[0]['counts'].as_py()} rows, expected one"
        )
    text = (
        table.column("text")
        if "text" in table.column_names
        else pa.chunked_array([pa.nulls(len(ids), pa.string())])
    )
    return pa.table({"id": ids.combine_chunks(), "title": table.column("title"), "text": text})


def _item_columns(path: Path, present: list[str]) -> list[str]:
    names = ["item", "title", *(["text"] if "text" in present else [])]
    require_columns(path, dict.fromkeys(names, "data.items_path"), present)
    return names


def _csv_items(path: Path) -> pa.Table:
    names = _item_columns(path, header_names(path, _dialect(path)))
    rejects = Rejects(hint="mend it: items are not skipped")
    batches = []
    for batch, lines in read_columns(
        path, names, dict.fromkeys(names, "data.items_path"), _dialect(path), rejects
    ):
        missing = np.flatnonzero(_missing(batch.column("item")))
        for line in lines.at(missing[:1]) if len(missing) else ():
            rejects.add(path, line, "no item id")
        batches.append(batch)
    return pa.Table.from_batches(batches, pa.schema([(name, pa.string()) for name in names]))


def _parquet_items(path: Path) -> pa.Table:
    file = open_parquet(path)
    names = _item_columns(path, file.schema_arrow.names)
    batches, first = [], 1
    for batch in parquet_batches(path, file, names):
        columns = {name: _text(path, name, batch.column(name), first) for name in names}
        missing = np.flatnonzero(_missing(columns["item"]))
        if len(missing):
            raise UserError(
                f"{path}: row {first + missing[0]}: no item id; mend it: items are not skipped"
            )
        batches.append(pa.record_batch(columns))
        first += batch.num_rows
    return pa.Table.from_batches(batches, pa.schema([(name, pa.string()) for name in names]))


def _text(path: Path, name: str, column: pa.Array, first: int) -> pa.Array:
    try:
        column = plain(column)
        if name == "item" and not (
            pa.types.is_integer(column.type)
            or pa.types.is_string(column.type)
            or pa.types.is_large_string(column.type)
        ):
            raise UserError(
                f"{path}: column 'item' holds {column.type}, expected strings or integers"
            )
        text = text_or_null(column).cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(f"{path}: column {name!r} holds {column.type}, expected text") from None
    bad = np.flatnonzero(
        pc.and_(pc.is_valid(column), pc.is_null(text)).to_numpy(zero_copy_only=False)
    )
    if len(bad):
        raise UserError(
            f"{path}: row {first + bad[0]}: {name!r} is not UTF-8 text; mend it: items are not skipped"
        )
    return text


def _missing(ids: pa.Array) -> np.ndarray:
    """bool: ids that are null or empty."""
    return pc.equal(pc.fill_null(ids, ""), "").to_numpy(zero_copy_only=False)
