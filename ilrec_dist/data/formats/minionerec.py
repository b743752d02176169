"""MiniOneRec's CSV splits, put together into whole histories.

train/, valid/ and test/ have one row a target, with its history and the titles of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.files import require_file, single_file
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.reading.columns import strip_blanks
from ilrec_dist.data.reading.delimited import Dialect, read_columns
from ilrec_dist.data.reading.item_table import first_rows, item_rows, text_of
from ilrec_dist.data.reading.python_literal import parse_literal
from ilrec_dist.data.reading.source import Format, Rejects, Source

COLUMNS = ["user_id", "history_item_id", "item_id"]
TITLE_COLUMNS = ["user_id", "item_id", "item_title", "history_item_id", "history_item_title"]
SPLITS = ("train", "valid", "test")
# An id as Python writes it, without marks that would need a parser; bare nan and None are none.
ID = r"""(?:'[^'",\\]+'|"[^'",\\]+"|[^\s'",\[\]]+)"""
LIST = rf"^\s*\[\s*(?:{ID}(?:\s*,\s*{ID})*)?\s*\]\s*$"
MISSING = r"[\[,\s](?:nan|None)[\],\s]"


def minionerec_files(config: DataConfig) -> list[Path]:
    """The three CSV files.

    `data.path` is the folder that holds train/, valid/ and test/, or the CSV in train/
    where that holds several.
    """
    train = Path(config.path or "")
    if not train.is_file():
        train = single_file(train / "train", [".csv"], "MiniOneRec's training rows")
    return [require_file(train.parent.parent / split / train.name, "data.path") for split in SPLITS]


def read_minionerec(config: DataConfig) -> Source:
    """A user's items.

    The history of the first row, then every row's target, training first.

    The published split by time is not kept: the canonical split is leave-one-out.
    """
    files = minionerec_files(config)
    return Source(
        files[0],
        timed=False,
        batches=lambda rejects: _batches(files, rejects),
        item_table=lambda: _titles(files, config.max_bad_rows),
        item_file=files[0],
    )


def _batches(files: list[Path], rejects: Rejects) -> Iterator[pa.RecordBatch]:
    # Users whose history is known.
    known = pa.array([], pa.string())
    for path in files:
        for batch, lines in read_columns(path, COLUMNS, {}, Dialect(), rejects):
            user, history, item = (batch.column(name) for name in COLUMNS)
            user, item = strip_blanks(user), strip_blanks(item)
            filled = pc.fill_null(history, "")
            is_list = pc.and_not(
                pc.match_substring_regex(filled, LIST), pc.match_substring_regex(filled, MISSING)
            )
            present = pc.and_(_present(user), _present(item))
            good = pc.and_(present, is_list)
            bad = np.flatnonzero(~good.to_numpy(zero_copy_only=False))
            for row, line in zip(bad.tolist(), lines.at(bad) if len(bad) else [], strict=True):
                reason = (
                    f"expected user_id, item_id and a history such as [3, 14], "
                    f"found history {history[row].as_py()!r}"
                )
                rejects.add(path, line, reason)
            user, history, item = (column.filter(good) for column in (user, history, item))
            first, known = _new_users(user, known)
            # Of the first row of a new user the history counts.
            opens = np.zeros(len(user), bool)
            opens[first] = True
            yield _unfold(user, *_listed_ids(history.filter(pa.array(opens))), item, opens)


def _present(column: pa.Array) -> pa.Array:
    return pc.fill_null(pc.not_equal(column, ""), False)


def _new_users(user: pa.Array, known: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """(the first row of each user not in `known`, in row order; `known` with these)."""
    codes = user.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    first = np.unique(codes, return_index=True)[1]
    new = pc.invert(pc.is_in(user.take(pa.array(first)), value_set=known))
    first = np.sort(first[new.to_numpy(zero_copy_only=False)])
    return first, pa.concat_arrays([known, user.take(pa.array(first))])


def _listed_ids(history: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """ "[3, 14]" or "['3', '14']", "[]" → (int64 items of each, these as strings)."""
    inner = pc.utf8_trim_whitespace(pc.utf8_trim(pc.utf8_trim_whitespace(history), "[]"))
    lists = pc.split_pattern(inner, ",")
    empty = pc.equal(inner, "").to_numpy(zero_copy_only=False)
    lengths = np.where(empty, 0, pc.list_value_length(lists).to_numpy(zero_copy_only=False))
    items = pc.utf8_trim(pc.utf8_trim_whitespace(pc.list_flatten(lists)), "'\"")
    return lengths.astype(np.int64), strip_blanks(items.filter(pc.not_equal(items, "")))


def _unfold(
    user: pa.Array, lengths: np.ndarray, histories: pa.Array, item: pa.Array, opens: np.ndarray
) -> pa.RecordBatch:
    """One row an interaction.

    The items of the history come before the target that they open.

    user, item and opens: a row each. lengths, histories: of the rows where `opens` is
    true.
    """
    before = np.zeros(len(opens), np.int64)
    before[opens] = lengths
    targets = np.cumsum(before + 1) - 1
    source = np.empty(int((before + 1).sum()), np.int64)
    is_target = np.zeros(len(source), bool)
    is_target[targets] = True
    source[~is_target] = np.arange(before.sum())
    source[is_target] = np.arange(len(opens)) + before.sum()
    items = pa.concat_arrays([histories.cast(pa.string()), item]).take(pa.array(source))
    users = user.take(pa.array(np.repeat(np.arange(len(opens)), before + 1)))
    return pa.record_batch({"user": users, "item": items})


def _titles(files: list[Path], max_bad_rows: int) -> pa.Table:
    """The titles of the targets, and of the histories in the first row of each user.

    Bad rows were counted with the interactions.
    """
    rejects = Rejects(max_bad_rows)
    ids, titles, known = [], [], pa.array([], pa.string())
    for path in files:
        for batch, _ in read_columns(path, TITLE_COLUMNS, {}, Dialect(), rejects):
            ids.append(batch.column("item_id"))
            titles.append(batch.column("item_title"))
            first, known = _new_users(batch.column("user_id"), known)
            for row in first.tolist():
                pairs = _history_titles(batch, row)
                ids.append(pa.array([text_of(item) for item, _ in pairs], pa.string()))
                titles.append(pa.array([text_of(title) for _, title in pairs], pa.string()))
    count = sum(map(len, ids))
    rows = item_rows(pa.concat_arrays(ids), pa.concat_arrays(titles), pa.nulls(count, pa.string()))
    # A row without a title must not hide a later one of the same item that has one.
    titled = rows.filter(pc.and_(rows.column("title").is_valid(), rows.column("id").is_valid()))
    return first_rows(titled)


def _history_titles(batch: pa.RecordBatch, row: int) -> list[tuple[object, object]]:
    """(item, title) of a row's history; none where its lists do not fit together.

    A title that breaks the list costs titles, not interactions.
    """
    try:
        items, titles = (
            parse_literal(batch.column(name)[row].as_py() or "[]")
            for name in ("history_item_id", "history_item_title")
        )
        return list(zip(items, titles, strict=True))
    except (ValueError, TypeError):
        return []


FORMAT = Format(read_minionerec, minionerec_files)
