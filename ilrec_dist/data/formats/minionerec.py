"""MiniOneRec's CSV splits: train/, valid/ and test/ with one row a target, its history and titles; put together into whole histories."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.files import require_file, single_file
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.formats.delimited import Dialect, read_columns
from ilrec_dist.data.formats.recbole import first_rows
from ilrec_dist.data.formats.source import Rejects, Source

COLUMNS = ["user_id", "history_item_id", "item_id"]
SPLITS = ("train", "valid", "test")
ID = r"""(?:'[^'",\\]+'|"[^'",\\]+"|[^\s'",\[\]]+)"""  # as Python writes it, without marks that would need a parser
LIST = rf"^\s*\[\s*(?:{ID}(?:\s*,\s*{ID})*)?\s*\]\s*$"


def minionerec_files(config: DataConfig) -> list[Path]:
    """The three CSV files. `data.path` is the folder that holds train/, valid/ and test/, or the CSV in train/ where that holds several."""
    path = Path(config.path or "")
    train = (
        path
        if path.is_file()
        else single_file(path / "train", [".csv"], "MiniOneRec's training rows")
    )
    return [require_file(train.parent.parent / split / train.name, "data.path") for split in SPLITS]


def read_minionerec(config: DataConfig) -> Source:
    """A user's items: the history of the user's first row, then the target of every row, training rows first.

    The published split by time is not kept: the canonical split is leave-one-out.
    """
    files = minionerec_files(config)
    return Source(
        files[0],
        timed=False,
        batches=lambda rejects: _batches(files, rejects),
        item_table=lambda: _titles(files, config.max_bad_rows),
    )


def _batches(files: list[Path], rejects: Rejects) -> Iterator[pa.RecordBatch]:
    met = pa.array([], pa.string())  # users whose history is known
    for path in files:
        for batch, lines in read_columns(path, COLUMNS, {}, Dialect(), rejects):
            user, history, item = (batch.column(name) for name in COLUMNS)
            listed = pc.match_substring_regex(pc.fill_null(history, ""), LIST)
            good = pc.and_(pc.and_(pc.is_valid(user), pc.is_valid(item)), listed)
            bad = np.flatnonzero(~good.to_numpy(zero_copy_only=False))
            for row, line in zip(bad.tolist(), lines.at(bad) if len(bad) else [], strict=True):
                rejects.add(
                    path,
                    line,
                    f"expected user_id, item_id and a history such as [3, 14], found history {history[row].as_py()!r}",
                )
            user, history, item = (column.filter(good) for column in (user, history, item))
            first, met = _newcomers(user, met)
            opens = np.zeros(len(user), bool)
            opens[first] = True  # the first row of a user not met before: its history counts
            yield _unfold(user, *_ids(history.filter(pa.array(opens))), item, opens)


def _newcomers(user: pa.Array, met: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """(the first row of each user not in `met`, in row order; `met` with these)."""
    first = np.unique(
        user.dictionary_encode().indices.to_numpy(zero_copy_only=False), return_index=True
    )[1]
    first = np.sort(
        first[
            pc.invert(pc.is_in(user.take(pa.array(first)), value_set=met)).to_numpy(
                zero_copy_only=False
            )
        ]
    )
    return first, pa.concat_arrays([met, user.take(pa.array(first))])


def _ids(history: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """ "[3, 14]" or "['3', '14']", "[]" → (int64 items of each, these as strings)."""
    inner = pc.utf8_trim_whitespace(pc.utf8_trim(pc.utf8_trim_whitespace(history), "[]"))
    lists = pc.split_pattern(inner, ",")
    lengths = np.where(
        pc.equal(inner, "").to_numpy(zero_copy_only=False),
        0,
        pc.list_value_length(lists).to_numpy(zero_copy_only=False),
    )
    items = pc.utf8_trim(pc.utf8_trim_whitespace(pc.list_flatten(lists)), "'\"")
    return lengths.astype(np.int64), items.filter(pc.not_equal(items, ""))


def _unfold(
    user: pa.Array, lengths: np.ndarray, histories: pa.Array, item: pa.Array, opens: np.ndarray
) -> pa.RecordBatch:
    """One row an interaction: before the target of a row that opens a user's sequence come the items of its history."""
    before = np.zeros(len(opens), np.int64)
    before[opens] = lengths
    targets = np.cumsum(before + 1) - 1
    source = np.empty(int((before + 1).sum()), np.int64)
    is_target = np.zeros(len(source), bool)
    is_target[targets] = True
    source[~is_target] = np.arange(before.sum())
    source[is_target] = np.arange(len(opens)) + before.sum()
    items = pa.concat_arrays([histories.cast(pa.string()), item]).take(pa.array(source))
    return pa.record_batch(
        {"user": user.take(pa.array(np.repeat(np.arange(len(opens)), before + 1))), "item": items}
    )


def _titles(files: list[Path], max_bad_rows: int) -> pa.Table:
    """The titles of the targets, and of items that occur only in histories from the first row of each user. Bad rows were counted with the interactions."""
    rejects = Rejects(max_bad_rows)
    ids, titles, met = [], [], pa.array([], pa.string())
    for path in files:
        for batch, _ in read_columns(
            path,
            ["user_id", "item_id", "item_title", "history_item_id", "history_item_title"],
            {},
            Dialect(),
            rejects,
        ):
            ids.append(batch.column("item_id"))
            titles.append(batch.column("item_title"))
            first, met = _newcomers(batch.column("user_id"), met)
            for row in first.tolist():
                try:
                    found = [
                        ast.literal_eval(batch.column(name)[row].as_py() or "[]")
                        for name in ("history_item_id", "history_item_title")
                    ]
                    pairs = list(zip(*found, strict=True))
                except (
                    ValueError,
                    SyntaxError,
                    TypeError,
                ):  # a title that breaks the list costs titles, not interactions
                    continue
                ids.append(pa.array([str(item) for item, _ in pairs], pa.string()))
                titles.append(pa.array([str(title) for _, title in pairs], pa.string()))
    table = pa.table({"id": pa.concat_arrays(ids), "title": pa.concat_arrays(titles)}).drop_null()
    return first_rows(table.append_column("text", pa.nulls(table.num_rows, pa.string())))
