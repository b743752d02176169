"""Delimited text streamed by pyarrow.

Under CSV, RecBole, MovieLens and MiniOneRec files.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_columns
from ilrec_dist.data.reading.columns import checked_batch
from ilrec_dist.data.reading.lines import RecordLines
from ilrec_dist.data.reading.source import Rejects
from ilrec_dist.data.reading.streams import UNPACK_ERRORS, open_bytes, open_text
from ilrec_dist.data.reading.times import Times, failing_rows

BLOCK_BYTES = 32 << 20
# Every field of a row that is put behind the last one. Within quotes that are still open it is
# no row of its own, which shows that they are.
END = "\x03end of the file\x03"


_default_hook = sys.unraisablehook


def _unraisable_hook(unraisable: Any) -> None:
    """Keep one exception of pyarrow's quiet.

    `read_columns` raises an error of its own for it.

    pyarrow decodes a malformed row as text before `skip` gets it, and where the row is
    no text, shows an exception and goes on.
    """
    if not (
        isinstance(unraisable.exc_value, UnicodeDecodeError)
        and getattr(unraisable.object, "__qualname__", "") == "read_columns.<locals>.skip"
    ):
        _default_hook(unraisable)


sys.unraisablehook = _unraisable_hook


@dataclass(frozen=True)
class Dialect:
    """How the fields of a file are written."""

    delimiter: str = ","
    # Column names where the file has no header line.
    names: Sequence[str] | None = None
    # Whether fields may be in quotes.
    quoted: bool = True


def read_delimited(
    path: Path,
    columns: dict[str, str],
    keys: dict[str, str],
    dialect: Dialect,
    rejects: Rejects,
    times: Times | None,
) -> Iterator[pa.RecordBatch]:
    """Yield batches of user, item and, with `times`, timestamp.

    columns: role (user, item, time) → column name in the file. keys: role → what chose
    that name, for errors. Files ending in .gz are unpacked on the way. Raises UserError
    naming file and line.
    """
    chosen_by = {columns[role]: key for role, key in keys.items() if role in columns}
    for batch, lines in read_columns(path, list(columns.values()), chosen_by, dialect, rejects):
        by_role = {role: batch.column(name) for role, name in columns.items()}
        yield checked_batch(path, by_role, times, rejects, lines.at)


@dataclass
class Lines:
    """Where the rows of one batch stand in the file.

    Worked out when asked, by reading again.
    """

    path: Path
    # Rows handed out before this batch.
    first: int
    # Records that were dropped, counted from 1 without the header.
    malformed: list[int]
    records: RecordLines
    # The rows of the batch as parsed that are left, where some are not.
    kept: np.ndarray | None = None

    def at(self, rows: np.ndarray) -> list[int]:
        """Physical line numbers, from 1, of rows of the batch."""
        good = np.asarray(rows if self.kept is None else self.kept[rows]) + self.first + 1
        # For each dropped record: the good ones before it, and one.
        dropped = np.array(self.malformed, np.int64) - np.arange(len(self.malformed))
        return self.records.of(good + np.searchsorted(dropped, good, side="right"))


class _MalformedRows:
    """The rows that pyarrow's parser drops, and their way to `rejects`.

    pyarrow calls `skip`, perhaps in a thread of its own while others are reported. An
    exception must not pass through its parser, so `report` is called between batches.
    """

    def __init__(
        self, path: Path, dialect: Dialect, fields: int, records: RecordLines, rejects: Rejects
    ) -> None:
        self.path, self.dialect, self.fields = path, dialect, fields
        self.records, self.rejects = records, rejects
        # The dropped records, counted from 1 without the header.
        self.numbers: list[int] = []
        # Number of fields and text of those that are not reported yet.
        self.pending: list[tuple[int, str]] = []
        self.reported = 0

    def report(self) -> None:
        """Hand the rows that were dropped so far to `rejects`."""
        pending = self.pending[:]
        if not pending:
            return
        dropped = np.array(self.numbers[self.reported : self.reported + len(pending)])
        self.reported += len(pending)
        del self.pending[: len(pending)]
        for line, (fields, text) in zip(self.records.of(dropped), pending, strict=True):
            self._reject(line, fields, text)

    def _reject(self, line: int, fields: int, text: str) -> None:
        if END in text:
            raise _open_quote(self.path, line)
        reason = (
            f"malformed row: {fields} fields, expected {self.fields} "
            f"({self.dialect.delimiter!r}-separated)"
        )
        # Each line of a malformed row may have been a row.
        first, *further = text.split("\n")
        if further:
            reason += f", over {1 + len(further)} lines; is a quote mark left open?"
        self.rejects.add(self.path, line, reason, first)
        for number, part in enumerate(further, line + 1):
            reason = f"in the malformed row that begins on line {line}"
            self.rejects.add(self.path, number, reason, part)


def read_columns(
    path: Path, columns: list[str], keys: dict[str, str], dialect: Dialect, rejects: Rejects
) -> Iterator[tuple[pa.RecordBatch, Lines]]:
    """Yield batches of the named columns as strings (empty fields are null), with their
    lines.
    """
    names, header = (list(dialect.names), 0) if dialect.names else _header(path, dialect)
    wanted = {column: keys.get(column, "expected by the format") for column in columns}
    require_columns(path, wanted, names)
    records = RecordLines(path, dialect.delimiter, dialect.quoted, header)
    dropped = _MalformedRows(path, dialect, len(names), records, rejects)

    def skip(row: pacsv.InvalidRow) -> str:
        dropped.numbers.append(row.number - header)
        dropped.pending.append((row.actual_columns, row.text))
        return "skip"

    first, ended = 0, not dialect.quoted
    try:
        for batch in _open_csv(path, names, header, columns, dialect, skip):
            dropped.report()
            if dialect.quoted and batch.num_rows and batch.column(0)[-1].as_py() == END.encode():
                ended, batch = True, batch.slice(0, batch.num_rows - 1)
            lines = Lines(path, first, dropped.numbers, records)
            yield _as_text(batch, lines, rejects)
            first += batch.num_rows
            records.forget(first)
        dropped.report()
        if not ended:
            last = Lines(path, first, dropped.numbers, records)
            raise _open_quote(path, last.at(np.array([-1]))[0] if first else header + 1)
    except (pa.ArrowInvalid, OSError, *UNPACK_ERRORS) as error:
        dropped.report()
        # There is nothing behind the header.
        if "Empty CSV" in str(error) or "Could not skip initial" in str(error):
            return
        raise _unreadable(
            path, str(error).splitlines()[0], dialect, header, first, dropped
        ) from None


def _open_csv(
    path: Path, names: list[str], header: int, columns: list[str], dialect: Dialect, skip: Any
) -> pacsv.CSVStreamingReader:
    end = dialect.delimiter.join([END] * len(names))
    source: Any = path
    if dialect.quoted:
        source = _Ended(path, f"\n{end}\n")
    elif path.name.endswith(".gz"):
        source = open_bytes(path)
    return pacsv.open_csv(
        source,
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
            # Bytes become text in `_as_text`, where a row that is no text can be named.
            column_types=dict.fromkeys(columns, pa.binary()),
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=True,
        ),
    )


def _unreadable(
    path: Path, reason: str, dialect: Dialect, header: int, rows: int, dropped: _MalformedRows
) -> UserError:
    """The error for what pyarrow says of a file after `rows` rows."""
    # pyarrow says so of a malformed row only where its text could not be decoded for `skip`.
    if number := re.search(r"Row #([0-9]+): Expected", reason):
        line = dropped.records.of(np.array([int(number[1]) - header]))[0]
        return UserError(
            f"{path}: line {line}: malformed row, and not UTF-8 text; "
            f"mend it: such rows cannot be skipped"
        )
    if "straddling" in reason:
        line = Lines(path, rows, dropped.numbers, dropped.records).at(np.array([0]))[0]
        hint = "; is a quote mark left open?" if dialect.quoted else ""
        reason = f"from line {line} on, a row is longer than {BLOCK_BYTES:,} bytes{hint}"
    return UserError(f"{path}: cannot be read: {reason}")


class _Ended(io.RawIOBase):
    """A file's bytes, unpacked when its name ends in .gz, and `row` behind them."""

    def __init__(self, path: Path, row: str) -> None:
        self.stream, self.row = open_bytes(path), row.encode()

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
        f"{path}: line {line}: a quote mark of this row is left open: all rows behind it are "
        f"taken as its text; close it or take it out"
    )


def _as_text(batch: pa.RecordBatch, lines: Lines, rejects: Rejects) -> tuple[pa.RecordBatch, Lines]:
    """The batch with its columns as strings.

    Rows that are not UTF-8 go to `rejects`.
    """
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
        text = str([column[row].as_py() for column in batch.columns])
        rejects.add(lines.path, line, "not UTF-8 text", text)
    kept = np.setdiff1d(np.arange(batch.num_rows), bad)
    return batch.take(pa.array(kept)).cast(schema), dataclasses.replace(lines, kept=kept)


def header_names(path: Path, dialect: Dialect) -> list[str]:
    """The fields of the first line that is not empty.

    Raises UserError when there is none.
    """
    return _header(path, dialect)[0]


def _header(path: Path, dialect: Dialect) -> tuple[list[str], int]:
    """(the fields of the first row that is not empty, the number of lines up to its
    end).
    """
    with open_text(path, "utf-8-sig") as file:
        reader = csv.reader(
            file,
            delimiter=dialect.delimiter,
            quoting=csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE,
        )
        try:
            for row in reader:
                if len(row) > 1 or "".join(row).strip():
                    fields = [field.strip() for field in row]
                    if dialect.quoted:
                        fields = [field.strip('"') for field in fields]
                    return fields, reader.line_num
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: no header line: {error}") from None
    raise UserError(f"{path}: the file is empty, expected a header line")
