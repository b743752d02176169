"""Delimited text streamed by pyarrow: the reader under CSV, RecBole, MovieLens, SASRec and MiniOneRec files."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_columns
from ilrec_dist.data.formats.columns import Times, checked_batch, failing_rows
from ilrec_dist.data.formats.lines import RecordLines
from ilrec_dist.data.formats.source import Rejects

BLOCK_BYTES = 32 << 20
END = "\x03end of the file\x03"  # in every field of a row put behind the last: in quotes that are still open it is no row


_shown = sys.unraisablehook


def _quietly(unraisable: Any) -> None:
    """pyarrow shows a malformed row as text before `skip` gets it; where it is none, it goes on with an error of its own, told below."""
    if not (
        isinstance(unraisable.exc_value, UnicodeDecodeError)
        and getattr(unraisable.object, "__qualname__", "") == "read_columns.<locals>.skip"
    ):
        _shown(unraisable)


sys.unraisablehook = _quietly


@dataclass(frozen=True)
class Dialect:
    delimiter: str = ","
    names: Sequence[str] | None = None  # column names where the file has no header line
    quoted: bool = True


def read_delimited(
    path: Path,
    columns: dict[str, str],
    keys: dict[str, str],
    dialect: Dialect,
    rejects: Rejects,
    time_kind: str | None = None,
) -> Iterator[pa.RecordBatch]:
    """Batches of user, item and, where `columns` names a time column, timestamp.

    columns: role (user, item, time) → column name in the file; keys: role → what chose that name, for errors; time_kind: see Times.
    Files ending in .gz are unpacked on the way.

    Raises UserError naming file and line.
    """
    text = read_columns(
        path,
        list(columns.values()),
        {columns[role]: key for role, key in keys.items() if role in columns},
        dialect,
        rejects,
    )
    times = Times(time_kind) if "time" in columns else None
    for batch, lines in text:
        yield checked_batch(
            path,
            {role: batch.column(name) for role, name in columns.items()},
            times,
            rejects,
            lines.at,
        )


@dataclass
class Lines:
    """Where the rows of one batch stand in the file; worked out only when asked, by reading the file again."""

    path: Path
    first: int  # rows handed out before this batch
    malformed: list[int]  # records that were dropped, counted from 1 without the header
    records: RecordLines
    kept: np.ndarray | None = None  # which rows of the batch as parsed are left, where some are not

    def at(self, rows: np.ndarray) -> list[int]:
        """Physical line numbers, from 1, of rows of the batch."""
        good = np.asarray(rows if self.kept is None else self.kept[rows]) + self.first + 1
        dropped = np.array(self.malformed, np.int64) - np.arange(
            len(self.malformed)
        )  # good records up to each, and one
        return self.records.of(good + np.searchsorted(dropped, good, side="right"))


def read_columns(
    path: Path, columns: list[str], keys: dict[str, str], dialect: Dialect, rejects: Rejects
) -> Iterator[tuple[pa.RecordBatch, Lines]]:
    """Batches of the named columns as strings (empty fields are null), each with the place of its rows."""
    names, header = (list(dialect.names), 0) if dialect.names else _header(path, dialect)
    require_columns(
        path, {column: keys.get(column, "expected by the format") for column in columns}, names
    )
    records = RecordLines(path, dialect.delimiter, dialect.quoted, header)
    malformed: list[int] = []
    pending: list[tuple[int, str]] = []  # fields and text of those that are not reported yet
    reported = 0

    def skip(
        row: pacsv.InvalidRow,
    ) -> str:  # in pyarrow's thread, which may run while others are reported
        malformed.append(row.number - header)
        pending.append((row.actual_columns, row.text))
        return "skip"

    def report() -> None:  # an exception must not pass through pyarrow's parser, which calls `skip`
        nonlocal reported
        some = pending[:]
        if some:
            places = records.of(np.array(malformed[reported : reported + len(some)]))
            reported += len(some)
            del pending[: len(some)]
            for line, (found, text) in zip(places, some, strict=True):
                if END in text:
                    raise _open_quote(path, line)
                over = text.split("\n")  # each line of it may have been a row
                hint = (
                    f", over {len(over)} lines; is a quote mark left open?" if len(over) > 1 else ""
                )
                rejects.add(
                    path,
                    line,
                    f"malformed row: {found} fields, expected {len(names)} ({dialect.delimiter!r}-separated){hint}",
                    over[0],
                )
                for further, part in enumerate(over[1:], 1):
                    rejects.add(
                        path,
                        line + further,
                        f"in the malformed row that begins on line {line}",
                        part,
                    )

    first, ended = 0, not dialect.quoted
    try:
        reader = pacsv.open_csv(
            _Ended(path, dialect.delimiter.join([END] * len(names))) if dialect.quoted else path,
            pacsv.ReadOptions(
                use_threads=False, block_size=BLOCK_BYTES, column_names=names, skip_rows=header
            ),
            pacsv.ParseOptions(
                delimiter=dialect.delimiter,
                quote_char='"' if dialect.quoted else False,
                newlines_in_values=dialect.quoted,
                invalid_row_handler=skip,
            ),
            pacsv.ConvertOptions(
                include_columns=columns,
                column_types=dict.fromkeys(
                    columns, pa.binary()
                ),  # as text below, where a row that is none can be named
                strings_can_be_null=True,
                null_values=[""],
                quoted_strings_can_be_null=True,
            ),
        )
        for batch in reader:
            report()
            if dialect.quoted and batch.num_rows and batch.column(0)[-1].as_py() == END.encode():
                ended, batch = True, batch.slice(0, batch.num_rows - 1)
            lines = Lines(path, first, malformed, records)
            yield _as_text(batch, lines, rejects)
            first += batch.num_rows
            records.forget(first)
        report()
        if not ended:
            raise _open_quote(
                path,
                Lines(path, first, malformed, records).at(np.array([-1]))[0]
                if first
                else header + 1,
            )
    except (pa.ArrowInvalid, OSError) as error:
        report()
        if "Empty CSV" in str(error) or "Could not skip initial" in str(
            error
        ):  # nothing behind the header
            return
        reason = str(error).splitlines()[0]
        if number := re.search(
            r"Row #([0-9]+): Expected", reason
        ):  # only where its text could not be decoded for `skip`
            line = records.of(np.array([int(number[1]) - header]))[0]
            raise UserError(
                f"{path}: line {line}: malformed row, and not UTF-8 text; mend it: such rows cannot be skipped"
            ) from None
        if "straddling" in reason:
            line = Lines(path, first, malformed, records).at(np.array([0]))[0]
            hint = "; is a quote mark left open?" if dialect.quoted else ""
            reason = f"from line {line} on, a row is longer than {BLOCK_BYTES:,} bytes{hint}"
        raise UserError(f"{path}: cannot be read: {reason}") from None


class _Ended(io.RawIOBase):
    """A file's bytes, unpacked when its name ends in .gz, and a last row behind them."""

    def __init__(self, path: Path, row: str) -> None:
        self.stream, self.row = (
            pa.input_stream(str(path), compression="detect"),
            f"\n{row}\n".encode(),
        )

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.stream.read(None if size < 0 else size)
        if not data or size < 0:
            data, self.row = data + self.row, b""
        return data

    def close(self) -> None:
        self.stream.close()
        super().close()


def _open_quote(path: Path, line: int) -> UserError:
    return UserError(
        f"{path}: line {line}: a quote mark of this row is left open: all rows behind it are taken as its text; close it or take it out"
    )


def _as_text(batch: pa.RecordBatch, lines: Lines, rejects: Rejects) -> tuple[pa.RecordBatch, Lines]:
    """The batch with its columns as strings; rows that are not UTF-8 go to `rejects`."""
    schema = pa.schema([(name, pa.string()) for name in batch.schema.names])

    try:
        return batch.cast(schema), lines
    except pa.ArrowInvalid:
        pass

    def works(first: int, last: int) -> bool:
        try:
            batch.slice(first, last - first).cast(schema)
            return True
        except pa.ArrowInvalid:
            return False

    bad = np.fromiter(failing_rows(batch.num_rows, works), np.int64)
    for row, line in zip(bad.tolist(), lines.at(bad), strict=True):
        rejects.add(
            lines.path,
            line,
            "not UTF-8 text",
            str([column[row].as_py() for column in batch.columns]),
        )
    kept = np.setdiff1d(np.arange(batch.num_rows), bad)
    return batch.take(pa.array(kept)).cast(schema), dataclasses.replace(lines, kept=kept)


def header_names(path: Path, dialect: Dialect) -> list[str]:
    """The fields of the first non-empty line. Raises UserError when there is none."""
    return _header(path, dialect)[0]


def _header(path: Path, dialect: Dialect) -> tuple[list[str], int]:
    """(the fields of the first row that is not empty, the lines up to its end)."""
    with open_text(path, "utf-8-sig") as file:
        reader = csv.reader(
            file,
            delimiter=dialect.delimiter,
            quoting=csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE,
        )
        try:
            for row in reader:
                if len(row) > 1 or "".join(row).strip():
                    return [
                        field.strip().strip('"') if dialect.quoted else field.strip()
                        for field in row
                    ], reader.line_num
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: no header line: {error}") from None
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
