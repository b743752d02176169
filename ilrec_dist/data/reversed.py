"""Training sequences in both directions (`data.both_directions`).

Where the order of items is partly arbitrary, reading backwards too tells a model more
of what goes together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from ilrec_dist.data.dataset import SPLITS, InteractionDataset, ItemArray


def both_directions(dataset: InteractionDataset) -> InteractionDataset:
    """The same data with as many users again, whose training items are in reversed
    order.

    User num_users + u has the training items of user u, latest first, all of them for
    training. Neither validation nor test items are read backwards, and the added users
    are evaluated in no split. They carry the ids of the users they repeat, so that
    whatever is decided by id, such as a user's fold (METHOD.md §5), is the same for
    both. Memory: 40 bytes a user; the items are read from where they lie.
    """
    lengths = dataset.train_lengths()
    offsets = np.concatenate([dataset.offsets, dataset.offsets[-1] + np.cumsum(lengths)])
    positions = np.full((1 + len(SPLITS), 2 * dataset.num_users), -1, np.int32)
    positions[0] = np.tile(lengths, 2)
    for row, split in enumerate(SPLITS, start=1):
        positions[row, : dataset.num_users] = dataset.target_positions(split)
    return dataclasses.replace(
        dataset,
        items=ReversedItems(dataset.items, offsets, dataset.num_users),
        offsets=offsets,
        user_ids=RepeatedIds(dataset.user_ids),
        split_positions=positions,
    )


class ReversedItems:
    """The items of `both_directions`, int32 [offsets[-1]], worked out when read.

    First come those of `forward`, then of each user the training part from its end.
    """

    def __init__(self, forward: ItemArray, offsets: np.ndarray, users: int) -> None:
        """offsets: int64 [2 · users + 1] of the doubled users."""
        self.forward, self.begins, self.ends = forward, offsets[:users], offsets[users + 1 :]
        self.size = int(offsets[-1])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> np.ndarray:
        """As of a NumPy array.

        A slice, or integers of any shape, negative from the end.

        Raises IndexError outside of the items.
        """
        split = len(self.forward)
        if isinstance(index, slice):
            start, stop, step = index.indices(self.size)
            if step == 1 and stop <= split:
                return np.asarray(self.forward[start:stop])
            index = np.arange(start, stop, step)
        index = np.asarray(index)
        if not np.issubdtype(index.dtype, np.integer):
            raise IndexError(f"items are read by slice or integers, not by {index.dtype}")
        if index.size and (index.min() < -self.size or index.max() >= self.size):
            raise IndexError(f"an index outside of {self.size} items")
        index = np.where(index < 0, index + self.size, index)
        # The user who is read backwards; 0 for what is read forwards, and not used then.
        user = np.searchsorted(self.ends, index, side="right")
        backwards = self.begins[user] + self.ends[user] - 1 - index
        return np.asarray(self.forward[np.where(index < split, index, backwards)])


class RepeatedIds(Sequence[str]):
    """Strings, and the same once more; none is copied."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = strings

    def __len__(self) -> int:
        return 2 * len(self.strings)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.strings[index % len(self.strings)]

    def __iter__(self) -> Iterator[str]:
        yield from self.strings
        yield from self.strings
