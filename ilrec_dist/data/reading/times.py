"""Times of any form → int64.

Integers, decimal numbers, ISO 8601 dates, Arrow timestamps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# The kinds of times in text columns, each with its pattern; what fits none may be a date.
KINDS = {
    "integer": r"^-?[0-9]{1,19}$",
    "decimal": r"^-?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?$",
    "zoned date": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9:.]+(Z|[+-][0-9]{2}:?[0-9]{2})$",
}
DATE = r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])([T ][0-9:.]+(Z|[+-][0-9:]+)?)?$"
ANY = "|".join([*KINDS.values(), DATE])
# Kind → what an error says is expected.
EXPECTED = {
    None: "a number or an ISO 8601 date",
    "integer": "an integer of 64 bits, as the first time is one",
    "decimal": "a number below 9·10¹⁵, as the first time is one",
    "zoned date": "an ISO 8601 date-time with a zone, as the first time is one",
    "date": "an ISO 8601 date, as the first time is one",
}
# The largest and the smallest integer that is a time, as digits.
LARGEST, SMALLEST = str(2**63 - 1), str(-(2**63))
# Decimal times are below this, so that their thousandths are integers of 64 bits.
LARGEST_DECIMAL = 9e15
# Arrow types that a time column may have: `pa.types.is_NAME`.
TYPES = ("integer", "floating", "decimal", "timestamp", "date", "string", "large_string")


class Times:
    """Converts a time column to int64, in one way throughout.

    Integers stay as they are, decimal numbers become thousandths, dates and timestamps
    milliseconds since 1970. In a text column the first value that is a time decides for
    all.
    """

    def __init__(self, kind: str | None = None) -> None:
        # A key of EXPECTED; None until the first time of a text column is seen.
        self.kind = kind

    def parse(self, column: pa.Array) -> pa.Array:
        """int64, null where a value is no time."""
        if pa.types.is_uint64(column.type):
            fits = pc.less(column, pa.scalar(2**63, pa.uint64()))
            column = pc.if_else(fits, column, pa.scalar(None, pa.uint64()))
        if pa.types.is_integer(column.type):
            return column.cast(pa.int64())
        if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
            return _thousandths(column.cast(pa.float64()))
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            return column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
        return self._parse_text(pc.utf8_trim_whitespace(column.cast(pa.string())))

    def _parse_text(self, text: pa.Array) -> pa.Array:
        if self.kind is None:
            is_time = pc.fill_null(pc.match_substring_regex(text, ANY), False)
            first = pc.index(is_time, True).as_py()
            if first < 0:
                return pa.nulls(len(text), pa.int64())
            self.kind = _kind(text[first].as_py())
        if self.kind in ("date", "zoned date"):
            return _dates(text, "UTC" if self.kind == "zoned date" else None)
        good = pc.match_substring_regex(text, KINDS[self.kind])
        if self.kind == "integer" and (pc.max(pc.binary_length(text)).as_py() or 0) >= len(LARGEST):
            good = pc.and_(good, _within_64_bits(text))
        text = pc.if_else(good, text, pa.scalar(None, pa.string()))
        if self.kind == "integer":
            return text.cast(pa.int64())
        return _thousandths(text.cast(pa.float64()))


def _kind(text: str) -> str:
    fitting = (kind for kind, pattern in KINDS.items() if re.search(pattern, text))
    return next(fitting, "date")


def _within_64_bits(integers: pa.Array) -> pa.Array:
    digits = pc.ascii_ltrim(integers, "-")
    shorter = pc.less(pc.binary_length(digits), len(LARGEST))
    small = pc.or_(pc.less_equal(digits, LARGEST), pc.equal(integers, SMALLEST))
    return pc.or_(shorter, small)


def _thousandths(values: pa.Array) -> pa.Array:
    good = pc.and_(pc.is_finite(values), pc.less(pc.abs(values), LARGEST_DECIMAL))
    values = pc.if_else(good, values, pa.scalar(None, pa.float64()))
    return pc.round(pc.multiply(values, 1000.0)).cast(pa.int64())


def _dates(text: pa.Array, zone: str | None) -> pa.Array:
    """Milliseconds since 1970, int64, null where a value is no date.

    Parts of a second that are finer than milliseconds are cut off.
    """

    def parsed(part: pa.Array) -> pa.Array:
        microseconds = part.cast(pa.timestamp("us", zone))
        return microseconds.cast(pa.timestamp("ms", zone), safe=False).cast(pa.int64())

    def works(first: int, last: int) -> bool:
        try:
            parsed(text.slice(first, last - first))
            return True
        except pa.ArrowInvalid:
            return False

    try:
        return parsed(text)
    except pa.ArrowInvalid:
        # Some value is no date, or finer than microseconds, which Arrow does not parse.
        nothing = pa.scalar(None, pa.string())
        text = pc.replace_substring_regex(text, r"(\.[0-9]{6})[0-9]+", r"\1")
        text = pc.if_else(pc.match_substring_regex(text, DATE), text, nothing)
        # What is left may still be no date, such as 30 February.
        bad = np.zeros(len(text), bool)
        bad[list(failing_rows(len(text), works))] = True
        return parsed(pc.if_else(pa.array(bad), nothing, text))


def failing_rows(count: int, works: Callable[[int, int], bool]) -> Iterator[int]:
    """The rows of `count` that do not work, in order, found by halving.

    works(first, last) tries a range at once; a range works where all of its rows do. So
    a few bad rows among many cost little.
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
