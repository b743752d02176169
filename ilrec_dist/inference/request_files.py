"""The files of a request for recommendations:
histories as Parquet, allowed items as text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_columns, require_file
from ilrec_dist.data.reading.columns import strip_blanks
from ilrec_dist.data.reading.parquet_file import open_parquet, parquet_batches
from ilrec_dist.inference.inputs import HistoryRanges

# The Arrow types of a column of lists: `pa.types.is_NAME`.
LIST_TYPES = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
COLUMNS = {"user": "the history's owner, a string", "items": "a list of item ids, oldest first"}
# Rows in memory at once where a whole file is checked.
CHECKED_ROWS = 1 << 14


@dataclass(frozen=True)
class Histories:
    """Rows of a file of histories."""

    users: list[str]
    ranges: HistoryRanges


class HistoriesFile:
    """A Parquet file with the columns user and items, read a part at a time.

    `item_index` maps every item id of the training data to its index. Whatever reads
    rows raises UserError that names the row (from 1) of a missing user, an empty
    history or an unknown item.
    """

    def __init__(self, path: str | Path, item_index: Mapping[str, int]) -> None:
        """Raises UserError where it is no such file."""
        self.path, self.item_index = require_file(path, "--histories"), item_index
        with open_parquet(self.path) as file:
            self.num_rows: int = file.metadata.num_rows
            schema = file.schema_arrow
        require_columns(self.path, COLUMNS, schema.names)
        if self.num_rows == 0:
            raise UserError(f"{self.path}: no rows; expected one history a row")
        items = schema.field("items").type
        if not any(getattr(pa.types, f"is_{name}")(items) for name in LIST_TYPES):
            raise UserError(f"{self.path}: column 'items' is {items}, expected {COLUMNS['items']}")

    def check(self) -> None:
        """Read all rows, and keep 8 bytes of each.

        Raises UserError, for a user on two rows too.
        """
        # Python's hash of strings has 64 bits. Equal ones are looked at again.
        hashes = np.concatenate(
            [np.fromiter(map(hash, part.users), np.int64) for _, part in self.parts(CHECKED_ROWS)]
        )
        hashes.sort()
        self._refuse_repeated(set(hashes[1:][hashes[1:] == hashes[:-1]].tolist()))

    def parts(
        self, rows: int, numbers: Collection[int] | None = None
    ) -> Iterator[tuple[int, Histories]]:
        """Parts of `rows` rows in the file's order, with their numbers from 0.

        The last part may be shorter. numbers: the parts that are wanted; None: all.
        """
        for number, table in enumerate(self._tables(rows)):
            if numbers is None or number in numbers:
                yield number, self._histories(table, number * rows)

    def _tables(self, rows: int) -> Iterator[pa.Table]:
        """The columns, `rows` rows at a time; the file's own batches may be shorter."""
        pending: list[pa.RecordBatch] = []
        missing = rows
        with open_parquet(self.path) as file:
            for batch in parquet_batches(self.path, file, list(COLUMNS), rows):
                while batch.num_rows >= missing:
                    yield pa.Table.from_batches([*pending, batch.slice(0, missing)])
                    batch, pending, missing = batch.slice(missing), [], rows
                pending.append(batch)
                missing -= batch.num_rows
        if missing < rows:
            yield pa.Table.from_batches(pending)

    def _histories(self, table: pa.Table, first_row: int) -> Histories:
        """The rows of a table, which begins at `first_row` (from 0) of the file."""
        try:
            users = self._users(table.column("user"), first_row)
            lists = table.column("items").cast(pa.large_list(pa.string())).combine_chunks()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            user_type, item_type = (table.schema.field(name).type for name in COLUMNS)
            raise UserError(
                f"{self.path}: columns 'user' and 'items' are {user_type} and {item_type}, "
                "expected a string and a list of strings"
            ) from None
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        lengths = lengths.astype(np.int64)
        if (lengths == 0).any():
            row = int(np.argmin(lengths))
            raise UserError(
                f"{self.path}: row {first_row + row + 1} (user {users[row]!r}) has an empty "
                "history; expected at least one item, leave the row out"
            )
        stop = np.cumsum(lengths)
        # Blanks around an id are no part of it, as in the data that was prepared.
        ids = strip_blanks(lists.flatten())
        items = np.fromiter(
            (self.item_index.get(item, -1) for item in ids.to_pylist()),
            np.int64,
            count=int(stop[-1]),
        )
        if (items < 0).any():
            position = int(np.argmax(items < 0))
            row = int(np.searchsorted(stop, position, side="right"))
            raise UserError(
                f"{self.path}: row {first_row + row + 1} (user {users[row]!r}) has the item "
                f"{ids[position].as_py()!r}, which is not among the {len(self.item_index)} items "
                "that the run was trained on; leave it out"
            )
        return Histories(users, HistoryRanges(items, stop - lengths, stop))

    def _users(self, column: pa.ChunkedArray, first_row: int) -> list[str]:
        """The ids as strings."""
        missing = pc.is_null(column, nan_is_null=True).to_numpy()
        users: list[str] = strip_blanks(column.cast(pa.string()).combine_chunks()).to_pylist()
        for row, user in enumerate(users):
            if missing[row] or user == "":
                raise UserError(
                    f"{self.path}: row {first_row + row + 1} has no user (null or empty in column "
                    "'user'); expected an id on every row, such as the row's number"
                )
        return users

    def _refuse_repeated(self, hashes: Collection[int]) -> None:
        """A user stands on one row, so that an answer belongs to one history.

        hashes: those that more than one row has.
        """
        if not hashes:
            return
        first_row: dict[str, int] = {}
        for number, part in self.parts(CHECKED_ROWS):
            for row, user in enumerate(part.users, start=number * CHECKED_ROWS + 1):
                if hash(user) not in hashes:
                    continue
                if user in first_row:
                    raise UserError(
                        f"{self.path}: row {row} repeats the user {user!r} of row "
                        f"{first_row[user]}; expected one history a user: merge the rows, or give "
                        "them different ids"
                    )
                first_row[user] = row


def read_allowed_items(path: str | Path, item_index: Mapping[str, int]) -> np.ndarray:
    """bool [num_items]: the items that a text file names, one id a line.

    Empty lines are skipped. Raises UserError that names the line of an unknown item.
    """
    path = require_file(path, "--allowed")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}); expected one item id a line"
        ) from None
    allowed = np.zeros(len(item_index), bool)
    for number, line in enumerate(lines, start=1):
        item = line.strip()
        if item and item not in item_index:
            raise UserError(
                f"{path}: line {number}: {item!r} is not among the {len(item_index)} items that "
                "the run was trained on; leave it out"
            )
        if item:
            allowed[item_index[item]] = True
    if not allowed.any():
        raise UserError(f"{path}: names no item; expected one item id a line")
    return allowed
