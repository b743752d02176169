"""Which of a rank's head rows a dense scope covers: a slice of them, or a gathered list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.types import LossOptions


@dataclass(frozen=True, eq=False)
class Columns:
    """Local columns [start, stop) of the rank's shard; or, with `index` (int64, ascending), exactly those."""

    start: int
    stop: int
    index: Tensor | None = None

    def __len__(self) -> int:
        return self.stop - self.start if self.index is None else self.index.numel()

    def rows(self, device: torch.device) -> Tensor:
        """int64 [len]: these columns as a list."""
        return (
            torch.arange(self.start, self.stop, device=device) if self.index is None else self.index
        )

    def same(self, other: Columns | None) -> bool:
        return (
            other is not None
            and (self.start, self.stop) == (other.start, other.stop)
            and self.index is other.index
        )

    def pieces(self, head: Tensor, step: int) -> Iterator[tuple[slice, Tensor]]:
        """(range of these columns, their rows of the head), at most `step` at a time: views of the head, or gathered copies."""
        for i in range(0, len(self), step):
            j = min(i + step, len(self))
            yield (
                slice(i, j),
                head[self.start + i : self.start + j]
                if self.index is None
                else head.index_select(0, self.index[i:j]),
            )

    def find(self, local: Tensor) -> tuple[Tensor, Tensor]:
        """(position of local column ids within these columns, whether they are there); positions of absent ones are 0."""
        if self.index is None:
            inside = (local >= self.start) & (local < self.stop)
            return (local - self.start).masked_fill_(~inside, 0), inside
        if not len(self):
            return torch.zeros_like(local), torch.zeros_like(local, dtype=torch.bool)
        position = torch.searchsorted(self.index, local).clamp_(max=len(self) - 1)
        inside = self.index[position] == local
        return position.masked_fill_(~inside, 0), inside

    def local(self, position: Tensor) -> Tensor:
        """The inverse of find."""
        return position + self.start if self.index is None else self.index[position]

    def within(self, outer: Columns) -> slice | Tensor:
        """How to select these columns from a matrix over `outer`."""
        if self.index is None:
            assert outer.index is None
            return slice(self.start - outer.start, self.stop - outer.start)
        return self.index - outer.start if outer.index is None else slice(0, len(self))


def select(matrix: Tensor, where: slice | Tensor) -> Tensor:
    """Columns of a matrix: a view for a slice, a copy for an index."""
    return matrix[..., where] if isinstance(where, slice) else matrix.index_select(-1, where)


def dense_columns(scope: str, options: LossOptions, start: int, stop: int) -> Columns:
    """The local columns of scope `all` or `item_tokens` in a shard that owns global tokens [start, stop); padding is left out."""
    count = max(0, min(stop, options.vocab_size) - start)
    if scope == "all" or options.item_tokens is None:
        return Columns(0, count)
    if not isinstance(options.item_tokens, Tensor):
        low, high = (min(max(edge - start, 0), count) for edge in options.item_tokens)
        return Columns(low, max(low, high))
    low, high = torch.searchsorted(
        options.item_tokens, torch.tensor([start, start + count], device=options.item_tokens.device)
    ).tolist()
    index = options.item_tokens[low:high] - start
    if len(index) and int(index[-1] - index[0]) == len(index) - 1:
        return Columns(int(index[0]), int(index[-1]) + 1)
    return Columns(0, 0, index) if len(index) else Columns(0, 0)
