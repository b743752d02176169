"""Interactions → sorted, filtered integers, in memory that does not grow with their
number.

Columns are spilled to disk and streamed. The order of work: ids become dense codes
while reading; rows are split into ranges of users and sorted by (user, time, file
order); exact repeats go; the k-core is iterated to its fixed point over the sorted
rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ilrec_dist.data.ingest.encoder import Encoder
from ilrec_dist.data.ingest.threads import ordered_map

# User, item, and time or None.
Rows = tuple[np.ndarray, np.ndarray, np.ndarray | None]

# Rows that each thread works on at once: about 100 MB with what a sort needs besides.
CHUNK_ROWS = 2_000_000


@dataclass
class Spill:
    """Rows as raw columns on disk: user int32, item int32 and, if timed, time int64.

    Files are open only while rows are added.
    """

    folder: Path
    timed: bool
    rows: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        for name in self._columns():
            (self.folder / name).touch()

    def _columns(self) -> dict[str, type]:
        return {"user": np.int32, "item": np.int32, **({"time": np.int64} if self.timed else {})}

    def append(self, rows: Rows) -> None:
        for (name, dtype), column in zip(self._columns().items(), rows, strict=False):
            with open(self.folder / name, "ab") as file:
                file.write(np.ascontiguousarray(column, dtype).data)
        self.rows += len(rows[0])

    def ranges(self, rows: int = CHUNK_ROWS) -> list[tuple[int, int]]:
        """(start, count) of consecutive chunks."""
        return [(start, min(rows, self.rows - start)) for start in range(0, self.rows, rows)]

    def read(self, start: int, count: int) -> Rows:
        def column(name: str, dtype: type) -> np.ndarray:
            return np.fromfile(
                self.folder / name, dtype, count, offset=start * np.dtype(dtype).itemsize
            )

        return (
            column("user", np.int32),
            column("item", np.int32),
            column("time", np.int64) if self.timed else None,
        )

    def delete(self) -> None:
        shutil.rmtree(self.folder)


def spill_batches(
    batches: Iterable[pa.RecordBatch],
    spill: Spill,
    users: Encoder,
    items: Encoder,
    rows: int = CHUNK_ROWS,
) -> None:
    """Encode and spill a stream of batches.

    They are gathered to `rows`, or to half as many as there are users where that is
    more, because an encoder passes over its ids each time.
    """
    pending: list[pa.RecordBatch] = []

    def flush() -> None:
        table = pa.Table.from_batches(pending)
        pending.clear()
        time = _one(table, "timestamp").to_numpy(zero_copy_only=False) if spill.timed else None
        spill.append((users.encode(_one(table, "user")), items.encode(_one(table, "item")), time))

    for batch in batches:
        pending.append(batch)
        if sum(part.num_rows for part in pending) >= max(rows, len(users) // 2):
            flush()
    if pending:
        flush()


def _one(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def sort_rows(
    source: Spill, out: Spill, user_rank: np.ndarray, item_rank: np.ndarray, rows: int = CHUNK_ROWS
) -> int:
    """Write the rows of `source` to `out`, sorted by (user, time, file order).

    Users and items are replaced by their ranks. Exact repeats (the same user, item and
    time) are dropped; rows without times are never repeats. `source` is deleted.
    Returns the number of repeats that were dropped.
    """
    counts = np.zeros(user_rank.max(initial=-1) + 1, np.int64)

    def count(chunk: tuple[int, int]) -> np.ndarray:
        return np.bincount(user_rank[source.read(*chunk)[0]], minlength=len(counts))

    for chunk_counts in ordered_map(count, source.ranges(rows)):
        counts += chunk_counts
    bucket_of = ((np.cumsum(counts) - counts) // rows).astype(
        np.uint16 if source.rows < 65536 * rows else np.int32
    )
    buckets = int(bucket_of.max(initial=0)) + 1
    parts = [Spill(out.folder / f"part-{index}", out.timed) for index in range(buckets)]

    def deal(chunk: tuple[int, int]) -> tuple[Rows, np.ndarray]:
        user, item, time = source.read(*chunk)
        user, item = user_rank[user], item_rank[item]
        bucket = bucket_of[user]
        order = np.argsort(bucket, kind="stable")
        return (user[order], item[order], None if time is None else time[order]), np.searchsorted(
            bucket[order], np.arange(buckets + 1)
        )

    for dealt, bounds in ordered_map(deal, source.ranges(rows)):
        for index in np.flatnonzero(np.diff(bounds)):
            parts[index].append(_slice(dealt, slice(bounds[index], bounds[index + 1])))
    source.delete()
    dropped = 0
    for part, (ordered, repeats) in zip(parts, ordered_map(_sort_part, parts), strict=True):
        out.append(ordered)
        dropped += repeats
        part.delete()
    return dropped


def _sort_part(part: Spill) -> tuple[Rows, int]:
    user, item, time = part.read(0, part.rows)
    if time is None:
        return _slice((user, item, None), stable_order(user)), 0
    order = stable_order(time)
    order = order[stable_order(user[order])]
    user, item, time = user[order], item[order], time[order]
    repeat = _repeats(user, item, time)
    dropped = int(repeat.sum())
    return (_slice((user, item, time), ~repeat) if dropped else (user, item, time)), dropped


def _slice(rows: Rows, chosen: slice | np.ndarray) -> Rows:
    user, item, time = rows
    return user[chosen], item[chosen], None if time is None else time[chosen]


def stable_order(key: np.ndarray) -> np.ndarray:
    """np.argsort(key, kind="stable") of integers.

    Where key and row number fit into 63 bits together, both are sorted as one number,
    which is many times as fast.
    """
    if len(key) == 0:
        return np.zeros(0, np.int64)
    low, bits = int(key.min()), int(len(key) - 1).bit_length()
    if (int(key.max()) - low).bit_length() + bits > 63:
        return np.argsort(key, kind="stable")
    packed = (key.astype(np.int64) - low) << bits | np.arange(len(key))
    packed.sort()
    return packed & ((1 << bits) - 1)


def _repeats(user: np.ndarray, item: np.ndarray, time: np.ndarray) -> np.ndarray:
    """bool: rows that occur earlier with the same user, item and time.

    Rows come sorted by (user, time), so repeats lie in runs of equal keys.
    """
    repeat = np.zeros(len(user), bool)
    same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    in_run = np.zeros(len(user), bool)
    in_run[1:] |= same
    in_run[:-1] |= same
    rows = np.flatnonzero(in_run)
    if len(rows) == 0:
        return repeat
    starts = np.ones(len(rows), bool)
    starts[1:] = (rows[1:] != rows[:-1] + 1) | ~same[rows[1:] - 1]
    run = np.cumsum(starts)
    # The sort is stable: the earlier of two equal rows stays first.
    order = np.lexsort((item[rows], run))
    equal = (run[order][1:] == run[order][:-1]) & (item[rows][order][1:] == item[rows][order][:-1])
    repeat[rows[order[1:][equal]]] = True
    return repeat


@dataclass(frozen=True)
class Core:
    """What the k-core keeps."""

    # bool per user rank and per item rank.
    users: np.ndarray
    items: np.ndarray
    # Interactions that are kept, and rounds it took.
    rows: int
    rounds: int


def k_core(
    rows: Spill,
    num_users: int,
    num_items: int,
    min_user: int,
    min_item: int,
    chunk: int = CHUNK_ROWS,
) -> Core:
    """The largest set of interactions with `min_user` a user and `min_item` an item at
    least.

    Repeated interactions of one pair count each time. The rows, which are sorted by
    user, are streamed once a round until nothing more goes.
    """
    users, items = np.ones(num_users, bool), np.ones(num_items, bool)

    def count(range_: tuple[int, int]) -> tuple[int, np.ndarray, np.ndarray]:
        user, item, _ = rows.read(*range_)
        # Rows are sorted by user, so a chunk's users are a range.
        first = int(user[0])
        if not (users.all() and items.all()):
            alive = users[user] & items[item]
            user, item = user[alive], item[alive]
        return first, np.bincount(user - first), np.bincount(item, minlength=num_items)

    rounds = 0
    while True:
        user_counts, item_counts = np.zeros(num_users, np.int64), np.zeros(num_items, np.int64)
        for first, by_user, by_item in ordered_map(count, rows.ranges(chunk)):
            user_counts[first : first + len(by_user)] += by_user
            item_counts += by_item
        next_users, next_items = user_counts >= max(min_user, 1), item_counts >= max(min_item, 1)
        rounds += 1
        if (next_users == users).all() and (next_items == items).all():
            return Core(users, items, int(item_counts.sum()), rounds)
        users, items = next_users, next_items
