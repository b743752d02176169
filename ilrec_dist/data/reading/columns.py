"""Checks and conversions that all readers of columns share: ids, bad rows, texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.reading.source import Rejects
from ilrec_dist.data.reading.times import EXPECTED, TYPES, Times, failing_rows

# The bytes from which no blank is made in UTF-8: the visible characters of ASCII.
VISIBLE = range(ord("!"), ord("~") + 1)
TOO_LARGE_OR_NULL = "one: null, or too large (integers below 2⁶³, other numbers below 9·10¹⁵)"


def checked_batch(
    path: Path,
    columns: dict[str, pa.Array],
    times: Times | None,
    rejects: Rejects,
    numbers: Callable[[np.ndarray], Sequence[int]],
    unit: str = "line",
) -> pa.RecordBatch:
    """A batch of user, item and, with `times`, timestamp, in which no row is bad.

    columns: user, item and, with `times`, time, as arrays. numbers: rows of the batch →
    their `unit` numbers in the file. Bad rows go to `rejects`. Raises UserError for
    columns of unfit types.
    """
    columns = {name: plain(column) for name, column in columns.items()}
    whole = {name: text_or_null(column) for name, column in columns.items()}
    user, item = _ids(path, whole["user"], "user"), _ids(path, whole["item"], "item")
    good_user, good_item = _present(user), _present(item)
    good = pc.and_(good_user, good_item)
    batch = {"user": user, "item": item}
    if times is not None:
        _check_time_type(path, whole["time"].type)
        batch["timestamp"] = times.parse(whole["time"])
        good = pc.and_(good, pc.is_valid(batch["timestamp"]))
    if not pc.all(good).as_py():
        rows = np.flatnonzero(~good.to_numpy(zero_copy_only=False))
        for row, number in zip(rows.tolist(), numbers(rows), strict=True):
            if any(
                columns[name][row].is_valid and not whole[name][row].is_valid for name in columns
            ):
                reason = "not UTF-8 text"
            elif not good_user[row].as_py():
                reason = "no user id"
            elif not good_item[row].as_py():
                reason = "no item id"
            else:
                expected = TOO_LARGE_OR_NULL
                if times is not None and _is_string(whole["time"].type):
                    expected = EXPECTED[times.kind]
                reason = f"time {columns['time'][row].as_py()!r} is not {expected}"
            text = str([_shown(column[row]) for column in columns.values()])
            rejects.add(path, number, reason, text, unit)
        batch = {name: column.filter(good) for name, column in batch.items()}
    return pa.record_batch(batch)


def strip_blanks(ids: pa.Array) -> pa.Array:
    """Strings without the blanks around them, as header fields and times are read.

    Only where some string may have one is the column looked through by characters.
    """
    if not _is_string(ids.type) or len(ids) == 0:
        return ids
    _, offsets, data = ids.buffers()
    width = np.int64 if pa.types.is_large_string(ids.type) else np.int32
    bounds: np.ndarray = np.frombuffer(
        offsets, width, len(ids) + 1, ids.offset * np.dtype(width).itemsize
    )
    content = np.frombuffer(data or b"", np.uint8)[bounds[0] : bounds[-1]]
    if len(content) == 0 or not _may_hold_blanks(content):
        return ids
    edges = np.concatenate([bounds[:-1], bounds[1:] - 1]) - bounds[0]
    if _may_hold_blanks(content[edges.clip(0, len(content) - 1)]):
        return pc.utf8_trim_whitespace(ids)
    return ids


def _may_hold_blanks(content: np.ndarray) -> bool:
    # One comparison of unsigned bytes, which wrap around, finds those below and above.
    return bool((content - np.uint8(VISIBLE.start) >= len(VISIBLE)).any())


def text_or_null(column: pa.Array) -> pa.Array:
    """The column, with null for strings that are not UTF-8, which Parquet and JSON may
    hold.
    """
    if not _is_string(column.type):
        return column

    def works(first: int, last: int) -> bool:
        try:
            column.slice(first, last - first).validate(full=True)
            return True
        except pa.ArrowInvalid:
            return False

    bad = np.zeros(len(column), bool)
    bad[list(failing_rows(len(column), works))] = True
    if not bad.any():
        return column
    return pc.if_else(pa.array(bad), pa.scalar(None, column.type), column)


def plain(column: pa.Array) -> pa.Array:
    """A dictionary column as its values, a column of string views as strings."""
    if pa.types.is_dictionary(column.type):
        return plain(column.cast(column.type.value_type))
    return column.cast(pa.string()) if pa.types.is_string_view(column.type) else column


class UniqueIds:
    """Finds an id that occurs a second time among ids that come a batch at a time.

    Ids are gathered until there are half as many as are known, so the work is in
    proportion to their number, and so is the memory.
    """

    def __init__(self, refuse: Callable[[str, int, int], UserError]) -> None:
        """refuse: (id, number of its first row, number of its second row) →
        the error.
        """
        self.refuse = refuse
        self.known = pa.array([], pa.large_string())
        self.numbers = np.zeros(0, np.int64)
        self.pending: list[tuple[pa.Array, np.ndarray]] = []
        self.pending_rows = 0

    def add(self, ids: pa.Array, numbers: np.ndarray) -> None:
        """Take ids with the numbers of their rows.

        Raises refuse(…) for one that is known.
        """
        self.pending.append((ids.cast(pa.large_string()), numbers))
        self.pending_rows += len(ids)
        if self.pending_rows > len(self.known) // 2:
            self.check()

    def check(self) -> None:
        """Look through all that was added.

        Raises refuse(…) for an id that occurs twice.
        """
        self.known = pa.concat_arrays([self.known, *(ids for ids, _ in self.pending)])
        self.numbers = np.concatenate([self.numbers, *(numbers for _, numbers in self.pending)])
        self.pending, self.pending_rows = [], 0
        encoded = self.known.dictionary_encode()
        if len(encoded.dictionary) == len(self.known):
            return
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        first_rows = np.unique(codes, return_index=True)[1]
        repeated = np.ones(len(codes), bool)
        repeated[first_rows] = False
        second = int(np.flatnonzero(repeated)[0])
        first = int(first_rows[codes[second]])
        raise self.refuse(
            self.known[second].as_py(), int(self.numbers[first]), int(self.numbers[second])
        )


def _is_string(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype))


def _shown(value: pa.Scalar) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes().decode("utf-8", "replace")


def _check_time_type(path: Path, dtype: pa.DataType) -> None:
    if not any(getattr(pa.types, f"is_{name}")(dtype) for name in TYPES):
        raise UserError(
            f"{path}: the time column holds {dtype}, expected integers, numbers, dates, "
            f"timestamps or text"
        )


def _ids(path: Path, column: pa.Array, name: str) -> pa.Array:
    # Hashes may be beyond int64, so unsigned integers stay unsigned.
    if pa.types.is_uint64(column.type):
        return column
    if _is_string(column.type):
        return strip_blanks(column.cast(pa.string()))
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    raise UserError(f"{path}: the {name} column holds {column.type}, expected strings or integers")


def _present(column: pa.Array) -> pa.Array:
    """bool: ids that are neither null nor empty."""
    if pa.types.is_string(column.type):
        return pc.fill_null(pc.greater(pc.binary_length(column), 0), False)
    return pc.is_valid(column)
