"""Checks and conversions that all column readers share: ids without gaps, times as int64, bad rows found and counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.formats.source import Rejects

# How the first time in a text column is read decides for all.
KINDS = {
    "integer": r"^-?[0-9]{1,19}$",
    "decimal": r"^-?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?$",
    "zoned date": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9:.]+(Z|[+-][0-9]{2}:?[0-9]{2})$",
}
DATE = r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])([T ][0-9:.]+(Z|[+-][0-9:]+)?)?$"  # what may be one
ANY = "|".join([*KINDS.values(), DATE])
EXPECTED = {
    None: "a number or an ISO 8601 date",
    "integer": "an integer of 64 bits, as the first time is one",
    "decimal": "a number below 9·10¹⁵, as the first time is one",
    "zoned date": "an ISO 8601 date-time with a zone, as the first time is one",
    "date": "an ISO 8601 date, as the first time is one",
}
LARGEST = str(2**63 - 1)  # as many digits as an integer may have
TIMES = (
    "integer",
    "floating",
    "decimal",
    "timestamp",
    "date",
    "string",
    "large_string",
)  # Arrow types of a time column


class Times:
    """A time column as int64, read one way throughout, which the first value that is a time decides.

    Integers stay as they are; decimal numbers become thousandths; ISO 8601 dates and date-times become milliseconds since 1970.
    """

    def __init__(self, kind: str | None = None) -> None:
        self.kind = kind  # a key of EXPECTED; None until a text column's first time is seen

    def parse(self, column: pa.Array) -> pa.Array:
        """int64, null where a value does not parse."""
        if pa.types.is_uint64(column.type):
            column = pc.if_else(
                pc.less(column, pa.scalar(2**63, pa.uint64())), column, pa.scalar(None, pa.uint64())
            )
        if pa.types.is_integer(column.type):
            return column.cast(pa.int64())
        if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
            return self._thousandths(column.cast(pa.float64()))
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            return column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
        text = pc.utf8_trim_whitespace(column.cast(pa.string()))
        if self.kind is None:
            first = pc.index(pc.fill_null(pc.match_substring_regex(text, ANY), False), True).as_py()
            if first < 0:
                return pa.nulls(len(text), pa.int64())
            self.kind = next(
                (
                    kind
                    for kind, pattern in KINDS.items()
                    if re.search(pattern, text[first].as_py())
                ),
                "date",
            )
        if self.kind in ("date", "zoned date"):
            return _dates(text, "UTC" if self.kind == "zoned date" else None)
        good = pc.match_substring_regex(text, KINDS[self.kind])
        if self.kind == "integer" and (pc.max(pc.binary_length(text)).as_py() or 0) >= len(LARGEST):
            digits = pc.ascii_ltrim(text, "-")
            good = pc.and_(
                good,
                pc.or_(
                    pc.less(pc.binary_length(digits), len(LARGEST)), pc.less_equal(digits, LARGEST)
                ),
            )
        text = pc.if_else(good, text, pa.scalar(None, pa.string()))
        return (
            text.cast(pa.int64())
            if self.kind == "integer"
            else self._thousandths(text.cast(pa.float64()))
        )

    @staticmethod
    def _thousandths(values: pa.Array) -> pa.Array:
        values = pc.if_else(
            pc.and_(pc.is_finite(values), pc.less(pc.abs(values), 9e15)),
            values,
            pa.scalar(None, pa.float64()),
        )
        return pc.round(pc.multiply(values, 1000.0)).cast(pa.int64())


def _dates(text: pa.Array, zone: str | None) -> pa.Array:
    """Milliseconds since 1970, int64, null where a value is no date; finer parts of a second are cut off."""

    def parsed(part: pa.Array) -> pa.Array:
        return (
            part.cast(pa.timestamp("us", zone))
            .cast(pa.timestamp("ms", zone), safe=False)
            .cast(pa.int64())
        )

    def works(first: int, last: int) -> bool:
        try:
            parsed(text.slice(first, last - first))
            return True
        except pa.ArrowInvalid:
            return False

    try:
        return parsed(text)
    except pa.ArrowInvalid:  # some value is bad, or finer than microseconds
        nothing = pa.scalar(None, pa.string())
        text = pc.replace_substring_regex(text, r"(\.[0-9]{6})[0-9]+", r"\1")
        text = pc.if_else(pc.match_substring_regex(text, DATE), text, nothing)
        bad = np.zeros(len(text), bool)
        bad[list(failing_rows(len(text), works))] = True  # such as 30 February
        return parsed(pc.if_else(pa.array(bad), nothing, text))


def failing_rows(count: int, works: Callable[[int, int], bool]) -> Iterator[int]:
    """The rows of `count` that do not work, in order, found by halving: works(first, last) tries a range at once, so a few bad rows among many cost little.

    A range works where all of its rows do.
    """

    def search(first: int, last: int) -> Iterator[int]:
        if first == last or works(first, last):
            return
        if last - first == 1:
            yield first
            return
        middle = (first + last) // 2
        yield from search(first, middle)
        yield from search(middle, last)

    return search(0, count)


def checked_batch(
    path: Path,
    columns: dict[str, pa.Array],
    times: Times | None,
    rejects: Rejects,
    places: Callable[[np.ndarray], Sequence[int]],
    unit: str = "line",
) -> pa.RecordBatch:
    """A batch of user, item and, with `times`, timestamp, free of bad rows: each of those goes to `rejects`.

    columns: user, item and, with `times`, time, as arrays. places: row numbers within the batch → `unit` numbers in the file.
    """
    columns = {name: plain(column) for name, column in columns.items()}
    whole = {name: text_or_null(column) for name, column in columns.items()}
    user, item = _ids(path, whole["user"], "user"), _ids(path, whole["item"], "item")
    good_user, good_item = _present(user), _present(item)
    good = pc.and_(good_user, good_item)
    batch = {"user": user, "item": item}
    if times is not None:
        if not any(getattr(pa.types, f"is_{name}")(whole["time"].type) for name in TIMES):
            raise UserError(
                f"{path}: the time column holds {whole['time'].type}, expected integers, numbers, dates, timestamps or text"
            )
        batch["timestamp"] = times.parse(whole["time"])
        good = pc.and_(good, pc.is_valid(batch["timestamp"]))
    if not pc.all(good).as_py():
        rows = np.flatnonzero(~good.to_numpy(zero_copy_only=False))
        for row, place in zip(rows.tolist(), places(rows), strict=True):
            if any(
                columns[name][row].is_valid and not whole[name][row].is_valid for name in columns
            ):
                reason = "not UTF-8 text"
            elif not good_user[row].as_py():
                reason = "no user id"
            elif not good_item[row].as_py():
                reason = "no item id"
            else:
                text = pa.types.is_string(whole["time"].type) or pa.types.is_large_string(
                    whole["time"].type
                )
                expected = (
                    EXPECTED[times.kind]
                    if text and times
                    else "one: null, or too large (integers below 2⁶³, other numbers below 9·10¹⁵)"
                )
                reason = f"time {columns['time'][row].as_py()!r} is not {expected}"
            rejects.add(
                path, place, reason, str([_shown(column[row]) for column in columns.values()]), unit
            )
        batch = {name: column.filter(good) for name, column in batch.items()}
    return pa.record_batch(batch)


def text_or_null(column: pa.Array) -> pa.Array:
    """The column, with null for the strings of it that are not UTF-8, which a Parquet or JSON file may hold."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column

    def works(first: int, last: int) -> bool:
        try:
            column.slice(first, last - first).validate(full=True)
            return True
        except pa.ArrowInvalid:
            return False

    bad = np.zeros(len(column), bool)
    bad[list(failing_rows(len(column), works))] = True
    return pc.if_else(pa.array(bad), pa.scalar(None, column.type), column) if bad.any() else column


def _shown(value: pa.Scalar) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes().decode("utf-8", "replace")


def plain(column: pa.Array) -> pa.Array:
    """A dictionary column as its values."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _ids(path: Path, column: pa.Array, name: str) -> pa.Array:
    if pa.types.is_uint64(column.type):
        return column  # hashes may be beyond int64
    if pa.types.is_large_string(column.type) or pa.types.is_string(column.type):
        return column.cast(pa.string())
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    raise UserError(f"{path}: the {name} column holds {column.type}, expected strings or integers")


def _present(column: pa.Array) -> pa.Array:
    if pa.types.is_string(column.type):
        return pc.fill_null(pc.greater(pc.binary_length(column), 0), False)
    return pc.is_valid(column)
