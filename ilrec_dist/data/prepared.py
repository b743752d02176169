"""The canonical data set as loaded from a prepared folder: every user's chronological items as one flat array with offsets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ilrec_dist.data.files import read_json_object
from ilrec_dist.errors import UserError

FORMAT_VERSION = 1
FILES = ("interactions.parquet", "users.parquet", "items.parquet")


class Strings(Sequence[str]):
    """A column of strings that stays in Arrow: 10⁷ ids cost their bytes, not a Python object each. A missing value reads as ""."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

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
        for chunk in self.column.chunks:
            for value in chunk.to_pylist():
                yield value or ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Prepared:
    """One data set. Leave-one-out (METHOD.md §9): of a user's sequence [-1] is the test target, [-2] the validation target, [:-2] training."""

    items: np.ndarray  # int32 [T] item index, all users' interactions, chronological within a user
    offsets: np.ndarray  # int64 [U+1]
    user_ids: Sequence[str]
    item_ids: Sequence[str]
    titles: Sequence[str] | None = None
    texts: Sequence[str] | None = None

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
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def lengths(self) -> np.ndarray:
        """int64 [U] interactions per user."""
        return np.diff(self.offsets)

    def train_lengths(self) -> np.ndarray:
        """int64 [U] training interactions per user: all but the last two."""
        return np.maximum(self.lengths() - 2, 0)

    def targets(self, split: str) -> np.ndarray:
        """int32 [U] the users' targets of split "validation" or "test"."""
        return self.items[self.offsets[1:] - split_offset(split)]

    def history_stop(self, split: str) -> np.ndarray:
        """int64 [U] end (exclusive, into `items`) of the history that split may see: at test time the validation item belongs to it."""
        return self.offsets[1:] - split_offset(split)

    def train_mask(self) -> np.ndarray:
        """bool [T] interactions of the training split."""
        mask = np.ones(len(self.items), bool)
        mask[self.offsets[1:] - 1] = False
        mask[self.offsets[1:] - 2] = False
        return mask

    def user_of_interaction(self) -> np.ndarray:
        """int64 [T] the user of every interaction."""
        return np.repeat(np.arange(self.num_users), self.lengths())


def split_offset(split: str) -> int:
    """How far from the end of a user's sequence the split's target lies."""
    if split not in ("validation", "test"):
        raise ValueError(f"split {split!r}: expected validation or test")
    return 1 if split == "test" else 2


def load_prepared(folder: str | Path) -> Prepared:
    """Load what `prepare` wrote. Raises UserError when the folder is missing, incomplete or of another version."""
    folder = Path(folder)
    manifest_file = folder / "manifest.json"
    if not manifest_file.exists():
        raise UserError(f"{folder}: not a prepared data folder (no manifest.json); run `ilrec prepare` first")
    manifest = read_json_object(manifest_file)
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(f"{manifest_file}: version {manifest.get('version')!r}, expected {FORMAT_VERSION}; run `ilrec prepare` again")
    for name in FILES:
        expected = manifest["files"][name]["bytes"]
        if not (folder / name).exists() or (folder / name).stat().st_size != expected:
            raise UserError(f"{folder / name}: missing or not of the {expected} bytes that the manifest names; run `ilrec prepare` again")
    items = pq.read_table(folder / "interactions.parquet", columns=["item"]).column("item").to_numpy()
    users = pq.read_table(folder / "users.parquet")
    offsets = np.zeros(users.num_rows + 1, np.int64)
    np.cumsum(users.column("interactions").to_numpy(), out=offsets[1:])
    table = pq.read_table(folder / "items.parquet")
    return Prepared(
        items=items,
        offsets=offsets,
        user_ids=Strings(users.column("id")),
        item_ids=Strings(table.column("id")),
        titles=_texts(table.column("title")),
        texts=_texts(table.column("text")),
    )


def _texts(column: pa.ChunkedArray) -> Strings | None:
    return Strings(column) if column.null_count < len(column) else None
