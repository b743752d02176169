"""Checks and conversions that all column readers share: ids without gaps, times as int64, bad rows found and counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.data.readers.source import Rejects
from ilrec_dist.errors import UserError

# How the first value of a text column is read decides for all.
KINDS = {
    "integer": r"^-?[0-9]{1,18}$",
    "decimal": r"^-?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?$",
    "zoned date": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9:.]+(Z|[+-][0-9]{2}:?[0-9]{2})$",
}
DATE = r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])([T ][0-9:.]+(Z|[+-][0-9:]+)?)?$"  # what may be one
EXPECTED = {
    "integer": "an integer, as the first one is",
    "decimal": "a number, as the first one is",
    "zoned date": "an ISO 8601 date-time with a zone, as the first one is",
    "date": "a number or an ISO 8601 date",
}


class Times:
    """A time column as int64, read one way throughout, which its first value decides.

    Integers stay as they are; decimal numbers become thousandths; ISO 8601 dates and date-times become milliseconds since 1970.
    """

    def __init__(self, kind: str | None = None) -> None:
        self.kind = kind  # a key of EXPECTED; None until the first value of a text column is seen

    def parse(self, column: pa.Array) -> pa.Array:
        """int64, null where a value does not parse."""
        if pa.types.is_integer(column.type):
            return column.cast(pa.int64())
        if pa.types.is_floating(column.type):
            return self._thousandths(column.cast(pa.float64()))
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            return column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
        text = pc.utf8_trim_whitespace(column.cast(pa.string()))
        known = text.drop_null()
        if self.kind is None and len(known):
            first = known[0].as_py()
            self.kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, first)), "date")
        if self.kind in ("date", "zoned date"):
            return _dates(text, "UTC" if self.kind == "zoned date" else None)
        good = pc.match_substring_regex(text, KINDS[self.kind or "integer"])
        text = pc.if_else(good, text, pa.scalar(None, pa.string()))
        return text.cast(pa.int64()) if self.kind == "integer" else self._thousandths(text.cast(pa.float64()))

    @staticmethod
    def _thousandths(values: pa.Array) -> pa.Array:
        values = pc.if_else(pc.and_(pc.is_finite(values), pc.less(pc.abs(values), 9e15)), values, pa.scalar(None, pa.float64()))
        return pc.round(pc.multiply(values, 1000.0)).cast(pa.int64())


def _dates(text: pa.Array, zone: str | None) -> pa.Array:
    """Milliseconds since 1970, int64, null where a value is no date; finer parts of a second are cut off."""

    def parsed(part: pa.Array) -> pa.Array:
        return part.cast(pa.timestamp("us", zone)).cast(pa.timestamp("ms", zone), safe=False).cast(pa.int64())

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
    user, item = _ids(path, columns["user"], "user"), _ids(path, columns["item"], "item")
    good_user, good_item = _present(user), _present(item)
    good = pc.and_(good_user, good_item)
    batch = {"user": user, "item": item}
    if times is not None:
        batch["timestamp"] = times.parse(columns["time"])
        good = pc.and_(good, pc.is_valid(batch["timestamp"]))
    if not pc.all(good).as_py():
        rows = np.flatnonzero(~good.to_numpy(zero_copy_only=False))
        for row, place in zip(rows.tolist(), places(rows), strict=True):
            if not good_user[row].as_py():
                reason = "no user id"
            elif not good_item[row].as_py():
                reason = "no item id"
            else:
                reason = f"time {columns['time'][row].as_py()!r} is not {EXPECTED.get(times.kind or '', 'a time') if times else 'a time'}"
            rejects.add(path, place, reason, str([column[row].as_py() for column in columns.values()]), unit)
        batch = {name: column.filter(good) for name, column in batch.items()}
    return pa.record_batch(batch)


def _ids(path: Path, column: pa.Array, name: str) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_large_string(column.type) or pa.types.is_string(column.type):
        return column.cast(pa.string())
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    raise UserError(f"{path}: the {name} column holds {column.type}, expected strings or integers")


def _present(column: pa.Array) -> pa.Array:
    if pa.types.is_string(column.type):
        return pc.fill_null(pc.greater(pc.binary_length(column), 0), False)
    return pc.is_valid(column)
