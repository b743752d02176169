"""The files of a request for recommendations:
histories as Parquet, allowed items as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_columns, require_file
from ilrec_dist.data.reading.columns import strip_blanks
from ilrec_dist.inference.inputs import HistoryRanges

# The Arrow types of a column of lists: `pa.types.is_NAME`.
LIST_TYPES = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
COLUMNS = {"user": "the history's owner, a string", "items": "a list of item ids, oldest first"}


def read_histories(
    path: str | Path, item_index: Mapping[str, int]
) -> tuple[list[str], HistoryRanges]:
    """The users and histories of a Parquet file with the columns user and items.

    `item_index` maps every item id of the training data to its
    index. Raises UserError that names the row (from 1) of a
    missing or repeated user, an empty history or an unknown item.
    """
    path = require_file(path, "--histories")
    try:
        file = pq.ParquetFile(path)
        require_columns(path, COLUMNS, file.schema_arrow.names)
        table = file.read(columns=list(COLUMNS))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})"
        ) from None
    if table.num_rows == 0:
        raise UserError(f"{path}: no rows; expected one history a row")
    user_type, item_type = (table.schema.field(name).type for name in COLUMNS)
    if not any(getattr(pa.types, f"is_{name}")(item_type) for name in LIST_TYPES):
        raise UserError(f"{path}: column 'items' is {item_type}, expected {COLUMNS['items']}")
    try:
        users = _read_users(path, table.column("user"))
        lists = table.column("items").cast(pa.large_list(pa.string())).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(
            f"{path}: columns 'user' and 'items' are {user_type} and {item_type}, "
            "expected a string and a list of strings"
        ) from None
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    lengths = lengths.astype(np.int64)
    if (lengths == 0).any():
        row = int(np.argmin(lengths))
        raise UserError(
            f"{path}: row {row + 1} (user {users[row]!r}) has an empty history; "
            "expected at least one item, leave the row out"
        )
    stop = np.cumsum(lengths)
    # Blanks around an id are no part of it, as in the data that was prepared.
    ids = strip_blanks(lists.flatten())
    items = np.fromiter(
        (item_index.get(item, -1) for item in ids.to_pylist()), np.int64, count=int(stop[-1])
    )
    if (items < 0).any():
        position = int(np.argmax(items < 0))
        row = int(np.searchsorted(stop, position, side="right"))
        raise UserError(
            f"{path}: row {row + 1} (user {users[row]!r}) has the item "
            f"{ids[position].as_py()!r}, which is not among the {len(item_index)} items that the "
            "run was trained on; leave it out"
        )
    return users, HistoryRanges(items, stop - lengths, stop)


def _read_users(path: Path, column: pa.ChunkedArray) -> list[str]:
    """The ids as strings. A user stands on one
    row, so that an answer belongs to one history.
    """
    missing = pc.is_null(column, nan_is_null=True).to_numpy()
    users: list[str] = strip_blanks(column.cast(pa.string()).combine_chunks()).to_pylist()
    first_row: dict[str, int] = {}
    for row, user in enumerate(users):
        if missing[row] or user == "":
            raise UserError(
                f"{path}: row {row + 1} has no user (null or empty in column 'user'); "
                "expected an id on every row, such as the row's number"
            )
        if user in first_row:
            raise UserError(
                f"{path}: row {row + 1} repeats the user {user!r} of row {first_row[user] + 1}; "
                "expected one history a user: merge the rows, or give them different ids"
            )
        first_row[user] = row
    return users


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
