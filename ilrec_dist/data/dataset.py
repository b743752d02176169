"""The canonical data set as loaded from a prepared folder: every user's chronological items as one flat array with offsets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

FORMAT_VERSION = 2
SPLITS = ("validation", "test")
Users = np.ndarray | slice  # which users: their numbers, or ALL
ALL = slice(None)


class ItemArray(Protocol):
    """int32 [n] item indices, read by slice or integers: a NumPy array, or what is worked out when read (`data.directions`)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Strings(Sequence[str]):
    """A column of strings in a Parquet file, read when first looked into and kept in Arrow: 10⁷ ids cost their bytes, not a Python object each.

    Going through it reads a row group at a time and keeps nothing. A missing value reads as "".
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.rows = path, name, pq.read_metadata(path).num_rows

    @cached_property
    def column(self) -> pa.ChunkedArray:
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
        with _refused_when_damaged(self.path), pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(columns=[self.name]):
                for value in batch.column(0).to_pylist():
                    yield value or ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def _refused_when_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path}: damaged: {str(error).splitlines()[0]}; remove its folder and run `ilrec prepare` again"
        ) from None


@dataclass(frozen=True)
class InteractionDataset:
    """One data set. Leave-one-out (METHOD.md §9): of a user's sequence [-1] is the test target, [-2] the validation target, [:-2] training.

    With `places` (data.split chronological): training is a user's first places[0] interactions, the targets stand at places[1] (validation) and
    places[2] (test), -1 for users who have none. In either case a target's history is all that stands before it.
    """

    items: ItemArray  # int32 [T] item index, all users' interactions, chronological within a user
    offsets: np.ndarray  # int64 [U+1]
    user_ids: Sequence[str]
    item_ids: Sequence[str]
    titles: Sequence[str] | None = None
    texts: Sequence[str] | None = None
    split_positions: np.ndarray | None = None  # int32 [3, U]

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

    def lengths(self, users: Users = ALL) -> np.ndarray:
        """int64 interactions of each user."""
        return self.offsets[1:][users] - self.offsets[:-1][users]

    def train_lengths(self, users: Users = ALL) -> np.ndarray:
        """int64 training interactions of each user: a beginning of their sequence; for leave-one-out all but the last two."""
        return (
            np.maximum(self.lengths(users) - 2, 0)
            if self.split_positions is None
            else self.split_positions[0][users].astype(np.int64)
        )

    def target_positions(self, split: str, users: Users = ALL) -> np.ndarray:
        """int64 place in each user's sequence of the target of split "validation" or "test"; below 1 for a user who is not evaluated."""
        row = SPLITS.index(split)
        return (
            self.lengths(users) - len(SPLITS) + row
            if self.split_positions is None
            else self.split_positions[1 + row][users].astype(np.int64)
        )

    def evaluated(self, split: str) -> np.ndarray:
        """int64, ascending: the users who have a target in the split and something before it."""
        return np.flatnonzero(self.target_positions(split) >= 1)

    def targets(self, split: str, users: Users = ALL) -> np.ndarray:
        """int32 the targets of users who are evaluated."""
        return self.items[self.history_stop(split, users)]

    def history_stop(self, split: str, users: Users = ALL) -> np.ndarray:
        """int64 end (exclusive, into `items`) of the history that split may see, of users who are evaluated; at test time it holds the validation item."""
        return self.offsets[:-1][users] + self.target_positions(split, users)


def load_dataset(folder: str | Path) -> InteractionDataset:
    """Open what `prepare` wrote: sequences are mapped into memory, ids and texts read when first used.

    Raises UserError when the folder is missing, incomplete or of another version.
    """
    folder = Path(folder)
    manifest_file = folder / "manifest.json"
    if not manifest_file.exists():
        raise UserError(
            f"{folder}: not a prepared data folder (no manifest.json); run `ilrec prepare` first"
        )
    manifest = read_json_object(manifest_file)
    if manifest.get("version") not in (1, FORMAT_VERSION):
        raise UserError(
            f"{manifest_file}: version {manifest.get('version')!r}, expected {FORMAT_VERSION}; run `ilrec prepare` again"
        )
    for name, entry in manifest["files"].items():
        if not (folder / name).exists() or (folder / name).stat().st_size != entry["bytes"]:
            raise UserError(
                f"{folder / name}: missing or not of the {entry['bytes']} bytes that the manifest names; run `ilrec prepare` again"
            )
    items, offsets = (
        _read_version_1(folder)
        if manifest["version"] == 1
        else (map_array(folder / "sequences.npy"), map_array(folder / "offsets.npy"))
    )
    return InteractionDataset(
        items=items,
        offsets=offsets,
        user_ids=Strings(folder / "users.parquet", "id"),
        item_ids=Strings(folder / "items.parquet", "id"),
        titles=_texts(folder / "items.parquet", "title"),
        texts=_texts(folder / "items.parquet", "text"),
        split_positions=map_array(folder / "split_positions.npy")
        if "split_positions.npy" in manifest["files"]
        else None,
    )


def _read_version_1(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Folders of before there were arrays to map: the whole Parquet column is read."""
    lengths = pq.read_table(folder / "users.parquet", columns=["interactions"]).column(0).to_numpy()
    return pq.read_table(folder / "interactions.parquet", columns=["item"]).column(
        0
    ).to_numpy(), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _texts(path: Path, name: str) -> Strings | None:
    """The column, or None when it holds nothing but nulls; the file's statistics say so."""
    metadata = pq.read_metadata(path)
    column = metadata.schema.to_arrow_schema().get_field_index(name)
    groups = (
        metadata.row_group(group).column(column).statistics
        for group in range(metadata.num_row_groups)
    )
    return (
        Strings(path, name)
        if sum(group.null_count for group in groups) < metadata.num_rows
        else None
    )
