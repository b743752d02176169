"""The text files of S3Rec (a user and all items a line) and SASRec (a user and one item
a line).

Both are in chronological order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_file
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.reading.columns import UniqueIds
from ilrec_dist.data.reading.item_table import read_item_table
from ilrec_dist.data.reading.lines import line_blocks
from ilrec_dist.data.reading.source import Format, Rejects, Source
from ilrec_dist.data.reading.streams import open_text
from ilrec_dist.data.reading.table_files import item_files
from ilrec_dist.data.reading.table_signs import TABLE, TableSigns


def sequences_files(config: DataConfig) -> list[Path]:
    """The sequences and the item table (`data.items_path`), which these
    formats lack.
    """
    return [require_file(config.path or "", "data.path"), *item_files(config)]


def read_sequences(config: DataConfig) -> Source:
    """SASRec's form where the first line has two fields, S3Rec's where it has more."""
    path, *items = sequences_files(config)
    with open_text(path) as file:
        first_line: list[str] = next((line.split() for line in file if line.strip()), [])
    return Source(
        path,
        timed=False,
        batches=lambda rejects: _batches(path, len(first_line) == 2, rejects),
        item_table=lambda: read_item_table(items[0]) if items else None,
        item_file=items[0] if items else None,
    )


def _batches(path: Path, pairs: bool, rejects: Rejects) -> Iterator[pa.RecordBatch]:
    """The file's interactions. pairs: a line has a user and one item."""
    expected = "a user and " + ("an item, as in the first line" if pairs else "its items")
    users_seen = UniqueIds(lambda *repeat: _is_table(path, *repeat))
    signs = TableSigns()
    for block, first_line in line_blocks(path):
        lines = _lines(path, block, first_line, rejects)
        spaced = pc.replace_substring_regex(lines, "[ \t\r]+", " ")
        fields = pc.split_pattern(pc.ascii_trim_whitespace(spaced), " ")
        counts = pc.list_value_length(fields).to_numpy(zero_copy_only=False).astype(np.int64)
        blank = pc.equal(pc.binary_length(pc.ascii_trim_whitespace(lines)), 0)
        counts[blank.to_numpy(zero_copy_only=False)] = 0
        bad = ((counts != 2) if pairs else (counts < 2)) & (counts != 0)
        for row in np.flatnonzero(bad).tolist():
            line = lines[row].as_py()
            reason = f"{counts[row]} fields, expected {expected}"
            if counts[row] == 1 and "," in line:
                reason += f", separated by blanks; for a table {TABLE}"
            rejects.add(path, first_line + row, reason, line)
        good = (counts > 0) & ~bad
        fields = fields.filter(pa.array(good))
        if len(fields) == 0:
            continue
        line_users = pc.list_element(fields, 0)
        if not pairs:
            users_seen.add(line_users, first_line + np.flatnonzero(good))
        signs.add(fields, first_line + np.flatnonzero(good))
        parents = pc.list_parent_indices(fields).to_numpy()
        # The first field of a line is the user, all others are items.
        is_item = np.ones(len(parents), bool)
        is_item[np.flatnonzero(np.diff(parents, prepend=-1))] = False
        users = line_users.take(pa.array(parents[is_item]))
        items = pc.list_flatten(fields).filter(pa.array(is_item))
        yield pa.record_batch({"user": users, "item": items})
    users_seen.check()
    signs.check(path)


def _is_table(path: Path, user: str, first: int, second: int) -> UserError:
    """The error where a user begins two lines: then the lines are rows of a table."""
    return UserError(
        f"{path}: line {second}: user {user!r} begins line {first} too, but S3Rec's form has one "
        f"line a user with all its items; for rows of user, item, rating and time name the file "
        f"u.data and use data.format movielens (tab-separated), or {TABLE}"
    )


def _lines(path: Path, block: bytes, first_line: int, rejects: Rejects) -> pa.Array:
    """The lines of a block as strings.

    Those that are no text go to `rejects` and are empty.
    """
    if _is_text(block):
        whole = pa.array([block], pa.large_binary()).cast(pa.large_string())
        return pc.split_pattern(whole, "\n").values
    lines = enumerate(block.split(b"\n"), first_line)
    texts = [_decoded(path, line, number, rejects) for number, line in lines]
    return pa.array(texts, pa.large_string())


def _is_text(block: bytes) -> bool:
    try:
        block.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decoded(path: Path, line: bytes, number: int, rejects: Rejects) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        rejects.add(path, number, "not UTF-8 text", line.decode("utf-8", "replace"))
        return ""


FORMAT = Format(read_sequences, sequences_files, settings=frozenset({"path", "items_path"}))
