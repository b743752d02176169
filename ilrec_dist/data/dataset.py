"""The data set as loaded from a prepared folder.

All users' items as one array with offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import map_array, read_json_object
from ilrec_dist.common.manifest import MANIFEST, verify

FORMAT_VERSION = 3
SPLITS = ("validation", "test")
# Which users: their numbers, or ALL.
Users = np.ndarray | slice
ALL = slice(None)
REPAIR = "remove its folder and run `ilrec prepare` again"


class ItemArray(Protocol):
    """int32 [n] item numbers, read by slice or integers.

    An array, or `data.reversed`'s.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Strings(Sequence[str]):
    """A column of strings in a Parquet file, read when first looked into.

    It is kept in Arrow: 10⁷ ids cost their bytes, not a Python object each. Going
    through it reads a row group at a time and keeps nothing. A missing value reads as
    "".
    """

    def __init__(self, path: Path, name: str, rows: int, verify: Callable[[Path], None]) -> None:
        """verify: called with the path before the file is read.

        Raises where it is damaged.
        """
        self.path, self.name, self.rows, self.verify = path, name, rows, verify

    @cached_property
    def column(self) -> pa.ChunkedArray:
        self.verify(self.path)
        with _refused_when_damaged(self.path):
            return pq.read_table(self.path, columns=[self.name]).column(self.name)

    def __len__(self) -> int:
        return self.rows

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return [self[i] for i in range(start, stop, step)]
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.column[index % len(self)].as_py() or ""

    def __iter__(self) -> Iterator[str]:
        self.verify(self.path)
        with _refused_when_damaged(self.path), pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(columns=[self.name]):
                for value in batch.column(0).to_pylist():
                    yield value or ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class InteractionDataset:
    """All users' chronological items, and where the split cuts them (METHOD.md §9).

    Leave-one-out: of a user's sequence [-1] is the test target, [-2] the validation
    target, [:-2] training. With `split_positions` (data.split chronological): training
    is a user's first split_positions[0] interactions, the targets stand at positions
    split_positions[1] (validation) and split_positions[2] (test), -1 for users who have
    none. In either case a target's history is all that stands before it.
    """

    # int32 [T]: all users' interactions, chronological within a user.
    items: ItemArray
    # int64 [U + 1]: user u's interactions are items[offsets[u] : offsets[u + 1]].
    offsets: np.ndarray
    user_ids: Sequence[str]
    item_ids: Sequence[str]
    titles: Sequence[str] | None = None
    texts: Sequence[str] | None = None
    # int32 [3, U]
    split_positions: np.ndarray | None = None

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_interactions(self) -> int:
        return int(self.offsets[-1])

    def sequence(self, user: int) -> np.ndarray:
        """int32 view of the user's whole history, oldest first."""
        items: np.ndarray = self.items[self.offsets[user] : self.offsets[user + 1]]
        return items

    def lengths(self, users: Users = ALL) -> np.ndarray:
        """int64 interactions of each user."""
        return np.asarray(self.offsets[1:][users] - self.offsets[:-1][users])

    def train_lengths(self, users: Users = ALL) -> np.ndarray:
        """int64 training interactions of each user: the beginning of their sequence."""
        if self.split_positions is None:
            return np.asarray(np.maximum(self.lengths(users) - len(SPLITS), 0))
        return np.asarray(self.split_positions[0][users], np.int64)

    def target_positions(self, split: str, users: Users = ALL) -> np.ndarray:
        """int64 position in each user's sequence of the target of `split`.

        Below 1 for a user who is not evaluated in it. split: one of SPLITS.
        """
        row = SPLITS.index(split)
        if self.split_positions is None:
            return np.asarray(self.lengths(users) - len(SPLITS) + row)
        return np.asarray(self.split_positions[1 + row][users], np.int64)

    def evaluated(self, split: str) -> np.ndarray:
        """int64, ascending.

        The users who have a target in the split and something before it.
        """
        return np.flatnonzero(self.target_positions(split) >= 1)

    def targets(self, split: str, users: Users = ALL) -> np.ndarray:
        """int32 the targets of users who are evaluated."""
        targets: np.ndarray = self.items[self.history_stop(split, users)]
        return targets

    def history_stop(self, split: str, users: Users = ALL) -> np.ndarray:
        """int64 end (exclusive, into `items`) of the history that `split` may see.

        For users who are evaluated. At test time the history holds the validation item.
        """
        return np.asarray(self.offsets[:-1][users] + self.target_positions(split, users))


def load_dataset(folder: str | Path) -> InteractionDataset:
    """Open what `prepare` wrote.

    Sequences are mapped into memory, ids and texts read when first used. A file's
    SHA-256 is compared with the manifest before anything of it is read, once a process;
    that of the users when their ids are first used. Raises UserError when the folder is
    missing, incomplete, of another version, or damaged.
    """
    folder = Path(folder)
    manifest_file = folder / MANIFEST
    if not manifest_file.exists():
        raise UserError(
            f"{folder}: not a prepared data folder (no {MANIFEST}); run `ilrec prepare` first"
        )
    manifest = read_json_object(manifest_file, REPAIR)
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{manifest_file}: version {manifest.get('version')!r}, expected {FORMAT_VERSION}; "
            f"run `ilrec prepare` again"
        )
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{path}: missing or not of the {entry['bytes']} bytes that the manifest names; "
                f"run `ilrec prepare` again"
            )
    users, items = folder / "users.parquet", folder / "items.parquet"
    read_now = [name for name in manifest["files"] if name.endswith(".npy")]
    verify(folder, [*read_now, items.name], REPAIR)
    offsets = map_array(folder / "offsets.npy")
    with _refused_when_damaged(items):
        item_facts = pq.read_metadata(items)

    def column(path: Path, name: str, rows: int) -> Strings:
        return Strings(path, name, rows, lambda path: verify(path.parent, [path.name], REPAIR))

    def item_column(name: str) -> Strings | None:
        return column(items, name, item_facts.num_rows) if _has_values(item_facts, name) else None

    positions = folder / "split_positions.npy"
    return InteractionDataset(
        items=map_array(folder / "sequences.npy"),
        offsets=offsets,
        user_ids=column(users, "id", len(offsets) - 1),
        item_ids=column(items, "id", item_facts.num_rows),
        titles=item_column("title"),
        texts=item_column("text"),
        split_positions=map_array(positions) if positions.name in manifest["files"] else None,
    )


@contextmanager
def _refused_when_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: damaged: {str(error).splitlines()[0]}; {REPAIR}") from None


def _has_values(metadata: pq.FileMetaData, name: str) -> bool:
    """Whether a column holds anything but nulls; the file's statistics say so."""
    column = metadata.schema.to_arrow_schema().get_field_index(name)
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    nulls = sum(group.column(column).statistics.null_count for group in groups)
    return bool(nulls < metadata.num_rows)
