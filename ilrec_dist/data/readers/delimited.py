"""Delimited text streamed by pyarrow: the reader under CSV, RecBole, MovieLens, SASRec and MiniOneRec files."""

from __future__ import annotations

import dataclasses
import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from ilrec_dist.data.files import require_columns
from ilrec_dist.data.readers.columns import Times, checked_batch
from ilrec_dist.data.readers.source import Rejects
from ilrec_dist.errors import UserError

BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Dialect:
    delimiter: str = ","
    names: Sequence[str] | None = None  # column names where the file has no header line
    quoted: bool = True


def read_delimited(
    path: Path, columns: dict[str, str], keys: dict[str, str], dialect: Dialect, rejects: Rejects, time_kind: str | None = None
) -> Iterator[pa.RecordBatch]:
    """Batches of user, item and, where `columns` names a time column, timestamp.

    columns: role (user, item, time) → column name in the file; keys: role → what chose that name, for errors; time_kind: see Times.
    Files ending in .gz are unpacked on the way.

    Raises UserError naming file and line.
    """
    text = read_columns(path, list(columns.values()), {columns[role]: key for role, key in keys.items() if role in columns}, dialect, rejects)
    times = Times(time_kind) if "time" in columns else None
    for batch, lines in text:
        yield checked_batch(path, {role: batch.column(name) for role, name in columns.items()}, times, rejects, lines.at)


@dataclass
class Lines:
    """Where the rows of one batch stand in the file; worked out only when asked, by reading the file again."""

    path: Path
    first: int  # rows handed out before this batch
    header: int  # 1 when the file's first line is a header
    malformed: list[int]  # record numbers that were dropped, counted from 1 with the header
    kept: np.ndarray | None = None  # which rows of the batch as parsed are left, where some are not

    def at(self, rows: np.ndarray) -> list[int]:
        """Physical line numbers, from 1, of rows of the batch."""
        records = np.asarray(rows if self.kept is None else self.kept[rows]) + self.first + self.header + 1
        for number in self.malformed:  # in file order: each dropped record shifts those at and after it
            records = records + (records >= number)
        return physical_lines(self.path, records.tolist())


def read_columns(path: Path, columns: list[str], keys: dict[str, str], dialect: Dialect, rejects: Rejects) -> Iterator[tuple[pa.RecordBatch, Lines]]:
    """Batches of the named columns as strings (empty fields are null), each with the place of its rows."""
    malformed: list[int] = []
    fields: list[int] = []

    def skip(row: pacsv.InvalidRow) -> str:
        malformed.append(row.number)
        fields.append(row.actual_columns)
        return "skip"

    reported = 0

    def report() -> None:  # an exception must not pass through pyarrow's parser, which calls `skip`
        nonlocal reported
        for number, found in zip(malformed[reported:], fields[reported:], strict=True):
            reported += 1
            line = physical_lines(path, [number])[0]
            rejects.add(path, line, f"malformed row: {found} fields, expected {len(names)} ({dialect.delimiter!r}-separated)", _line(path, line))

    names = list(dialect.names) if dialect.names else header_names(path, dialect)
    require_columns(path, {column: keys.get(column, "expected by the format") for column in columns}, names)
    try:
        reader = pacsv.open_csv(
            path,
            pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=list(names), skip_rows=0 if dialect.names else 1),
            pacsv.ParseOptions(delimiter=dialect.delimiter, quote_char='"' if dialect.quoted else False, invalid_row_handler=skip),
            pacsv.ConvertOptions(
                include_columns=columns,
                column_types=dict.fromkeys(columns, pa.binary()),  # as text below, where a row that is none can be named
                strings_can_be_null=True,
                null_values=[""],
                quoted_strings_can_be_null=True,
            ),
        )
        first = 0
        for batch in reader:
            report()
            yield _as_text(batch, Lines(path, first, 0 if dialect.names else 1, malformed), rejects)
            first += batch.num_rows
        report()
    except (pa.ArrowInvalid, OSError) as error:
        report()
        if "Empty CSV" in str(error):
            return
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _as_text(batch: pa.RecordBatch, lines: Lines, rejects: Rejects) -> tuple[pa.RecordBatch, Lines]:
    """The batch with its columns as strings; rows that are not UTF-8 go to `rejects`."""
    schema = pa.schema([(name, pa.string()) for name in batch.schema.names])
    try:
        return batch.cast(schema), lines
    except pa.ArrowInvalid:
        bad = np.array([row for row in range(batch.num_rows) if not all(_decodes(column[row].as_py()) for column in batch.columns)], np.int64)
    for row, line in zip(bad.tolist(), lines.at(bad), strict=True):
        rejects.add(lines.path, line, "not UTF-8 text", str([column[row].as_py() for column in batch.columns]))
    kept = np.setdiff1d(np.arange(batch.num_rows), bad)
    return batch.take(pa.array(kept)).cast(schema), dataclasses.replace(lines, kept=kept)


def _decodes(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
        return True
    except UnicodeDecodeError:
        return False


def header_names(path: Path, dialect: Dialect) -> list[str]:
    """The fields of the first non-empty line. Raises UserError when there is none."""
    with open_text(path) as file:
        for line in file:
            if line.strip():
                return [
                    field.strip().strip('"') if dialect.quoted else field.strip() for field in line.rstrip("\r\n").lstrip("\ufeff").split(dialect.delimiter)
                ]
    raise UserError(f"{path}: the file is empty, expected a header line")


@contextmanager
def open_text(path: Path, encoding: str = "utf-8") -> Iterator[TextIO]:
    """A text file, unpacked when its name ends in .gz; undecodable bytes are replaced, for this is used for messages and titles only."""
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding=encoding, errors="replace", newline="\n") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked: {error}") from None


def physical_lines(path: Path, records: list[int]) -> list[int]:
    """Line numbers of records, both from 1; empty lines are no records."""
    wanted = dict.fromkeys(records, 0)
    last, record = max(records), 0
    with open_text(path) as file:
        for line, text in enumerate(file, 1):
            if text.strip("\r\n"):
                record += 1
                if record in wanted:
                    wanted[record] = line
                if record >= last:
                    break
    return [wanted[record] for record in records]


def _line(path: Path, number: int) -> str:
    with open_text(path) as file:
        return next((text.rstrip("\r\n") for line, text in enumerate(file, 1) if line == number), "")
