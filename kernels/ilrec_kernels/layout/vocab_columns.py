"""Which of a rank's head rows a dense scope covers: consecutive ones, or a list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.options import LossOptions


@dataclass(frozen=True, eq=False)
class VocabColumns:
    """Local columns [start, stop) of the rank's shard, or exactly those in `index`.

    `index` is int64 and ascending; where it is given, `start` and `stop` are 0.
    """

    start: int
    stop: int
    index: Tensor | None = None

    def __len__(self) -> int:
        return self.stop - self.start if self.index is None else self.index.numel()

    @property
    def is_scattered(self) -> bool:
        return self.index is not None

    def rows(self, device: torch.device) -> Tensor:
        """Return the columns as a list, int64 [len]."""
        if self.index is not None:
            return self.index
        return torch.arange(self.start, self.stop, device=device)

    def same(self, other: VocabColumns) -> bool:
        bounds = (self.start, self.stop) == (other.start, other.stop)
        return bounds and self.index is other.index

    def blocks(self, head: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield (range of these columns, their head rows), at most `rows` at a time.

        The head rows are views where the columns are consecutive, otherwise copies.
        """
        for i in range(0, len(self), rows):
            j = min(i + rows, len(self))
            if self.index is None:
                yield slice(i, j), head[self.start + i : self.start + j]
            else:
                yield slice(i, j), head.index_select(0, self.index[i:j])

    def find(self, local: Tensor) -> tuple[Tensor, Tensor]:
        """Map local column ids to positions within these columns.

        Returns (positions, mask); mask is False, and the position 0, where a column is
        not one of these.
        """
        if self.index is None:
            mask = (local >= self.start) & (local < self.stop)
            return (local - self.start).masked_fill_(~mask, 0), mask
        if not len(self):
            return torch.zeros_like(local), torch.zeros_like(local, dtype=torch.bool)
        position = torch.searchsorted(self.index, local).clamp_(max=len(self) - 1)
        mask = self.index[position] == local
        return position.masked_fill_(~mask, 0), mask

    def at(self, position: Tensor) -> Tensor:
        """Map positions within these columns to local column ids; the
        inverse of find.
        """
        return position + self.start if self.index is None else self.index[position]

    def within(self, outer: VocabColumns) -> slice | Tensor:
        """Return what selects these columns from a matrix over `outer`, which holds
        them.
        """
        if self.index is None:
            return slice(self.start - outer.start, self.stop - outer.start)
        return self.index - outer.start if outer.index is None else slice(0, len(self))


NO_COLUMNS = VocabColumns(0, 0)


def select_columns(matrix: Tensor, where: slice | Tensor) -> Tensor:
    """Return columns of a matrix: a view for a slice, a copy for an index."""
    return matrix[..., where] if isinstance(where, slice) else matrix.index_select(-1, where)


def dense_columns(scope: str, options: LossOptions, start: int, stop: int) -> VocabColumns:
    """Return the columns of scope `all` or `item_tokens` in a shard, without padding.

    The shard owns global tokens [start, stop).
    """
    count = max(0, min(stop, options.vocab_size) - start)
    if scope == "all" or options.item_tokens is None:
        return VocabColumns(0, count)
    if not isinstance(options.item_tokens, Tensor):
        low, high = (min(max(edge - start, 0), count) for edge in options.item_tokens)
        return VocabColumns(low, max(low, high))
    edges = torch.tensor([start, start + count], device=options.item_tokens.device)
    low, high = torch.searchsorted(options.item_tokens, edges).tolist()
    index = options.item_tokens[low:high] - start
    if not len(index):
        return NO_COLUMNS
    if int(index[-1] - index[0]) == len(index) - 1:
        return VocabColumns(int(index[0]), int(index[-1]) + 1)
    return VocabColumns(0, 0, index)
