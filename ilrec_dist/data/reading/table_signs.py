"""Signs that lines of blank-separated fields are rows of a table, not users with their
items.

A user and all its items a line (S3Rec's form) cannot be told from `user item rating
time` by repeated users where each user has one row. What tells them apart is that items
are of one kind: in a table one column is of another kind than the items, on every line.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.reading.times import DATE

# From the user on. The fifth is the clock of a time that is written as a date and a clock.
WIDTHS = (3, 4, 5)
# Unix times from 1990 to 2100 in seconds.
SECONDS = (631_152_000, 4_102_444_800)
# So many lines make chance improbable. If a share p of the items looked like times, one of three
# columns would be so on all of n lines, and the others on none, with (p·(1 - p)²)ⁿ ≤ .15ⁿ; where
# all ids are small, or all are large, that is never.
LINES_FOR_TIMES = 3
# For ratings, where the items beside them may be small numbers on a fifth of the lines, the
# chance is below .43ⁿ.
LINES_FOR_RATINGS = 20
SMALL_ITEMS = 0.2
NUMBER = r"^[0-9]{9,13}(\.[0-9]*)?$"
RATING = r"^(10|[0-9])(\.[05]?0*)?$"
INSIST = (
    "; if the fields are items nevertheless, write SASRec's form, a line with the user and one "
    "item for each of them"
)
TABLE = "use data.format csv (a header line, and fields separated by commas or tabs)"


class TableSigns:
    """Gathers what is common to all lines of a file, a batch at a time."""

    def __init__(self) -> None:
        self.lines = 0
        # Fields of every line; 0 where lines differ, or where that is no table's number.
        self.width = -1
        # Of each column: lines that look like a time, or like a rating.
        self.times = np.zeros(0, np.int64)
        self.ratings = np.zeros(0, np.int64)
        # Whether all fields but the last of every line end with a comma.
        self.commas = True
        # The number and the fields of the first line.
        self.first: tuple[int, list[str]] = (0, [])

    def add(self, fields: pa.Array, numbers: np.ndarray) -> None:
        """Take lines as lists of at least two fields, with their numbers; there is at
        least one.
        """
        if self.width == 0 and not self.commas:
            return
        if self.width < 0 and _is_header(fields[0].as_py()) and len(fields) > 1:
            fields, numbers = fields[1:], numbers[1:]
        if self.width < 0:
            self.first = int(numbers[0]), fields[0].as_py()
            self.width = len(self.first[1])
            self.times, self.ratings = (np.zeros(self.width, np.int64) for _ in range(2))
        if self.commas:
            self.commas = _end_with_commas(fields)
        widths = pc.list_value_length(fields).to_numpy(zero_copy_only=False)
        if self.width not in WIDTHS or (widths != self.width).any():
            self.width = 0
            return
        self.lines += len(fields)
        for column in range(1, self.width):
            values = pc.list_element(fields, column)
            self.times[column] += _count(_look_like_times(values))
            self.ratings[column] += _count(pc.match_substring_regex(values, RATING))

    def check(self, path: Path) -> None:
        """Raise UserError where what was added are rows of a table."""
        line, fields = self.first
        where = f"{path}: line {line}: "
        if self.commas and fields:
            raise UserError(
                f"{where}its fields end with commas, as those of all lines, but data.format "
                f"sequences separates fields by blanks; take them out, or for a table {TABLE}"
            )
        if self.width <= 0:
            return
        is_time = self.times == self.lines
        other_times = np.delete(self.times, np.flatnonzero(is_time))
        one_of_the_items = is_time.sum() == 1 and not is_time[1] and not other_times.any()
        if self.lines >= LINES_FOR_TIMES and one_of_the_items:
            column = int(np.flatnonzero(is_time)[0])
            is_movielens = self.width == 4 and column == 3
            advice = f"for rows of {'user, item, rating and time' if is_movielens else 'a table'} "
            if is_movielens:
                advice += "name the file u.data and use data.format movielens (tab-separated), or "
            raise UserError(
                f"{where}field {column + 1} ({fields[column]}) looks like a time, as on all lines, "
                f"and no item does, so that this is no user with all its items; {advice}{TABLE}"
                f"{INSIST}"
            )
        is_rating = self.width < 5 and self.ratings[2] == self.lines
        if (
            self.lines >= LINES_FOR_RATINGS
            and is_rating
            and self.ratings[1] <= SMALL_ITEMS * self.lines
        ):
            raise UserError(
                f"{where}field 3 ({fields[2]}) looks like a rating, as on all {self.lines:,} "
                f"lines, and field 2 does not, so that this is no user with all its items; for "
                f"rows of a table {TABLE}{INSIST}"
            )


def _is_header(fields: list[str]) -> bool:
    return not any(letter.isdigit() for field in fields for letter in field)


def _end_with_commas(fields: pa.Array) -> bool:
    texts = pc.binary_join(fields, pa.scalar(" ", fields.type.value_type))
    return bool(pc.all(pc.match_substring_regex(texts, r"^([^ ]*, )+[^ ]*[^ ,]$")).as_py())


def _look_like_times(values: pa.Array) -> pa.Array:
    """Whether each is a date, or a number that is a Unix time in seconds or
    milliseconds.
    """
    is_number = pc.match_substring_regex(values, NUMBER)
    numbers = pc.if_else(is_number, values, pa.scalar(None, values.type)).cast(pa.float64())
    first, last = SECONDS
    is_time = pc.match_substring_regex(values, DATE)
    for unit in (1, 1000):
        within = pc.and_(
            pc.greater_equal(numbers, first * unit), pc.less_equal(numbers, last * unit)
        )
        is_time = pc.or_(is_time, pc.fill_null(within, False))
    return is_time


def _count(flags: pa.Array) -> int:
    return int(pc.sum(flags).as_py() or 0)
