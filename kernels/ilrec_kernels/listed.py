"""Candidates for H as lists of one length for every row, which no one has to count: what the row kernels find and the gradients are written by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """Which columns of a matrix of logits are candidates: up to k of [first, last), but for the target's, by z̄ (METHOD.md §2)."""

    bars: Tensor  # fp32 [n]: what z̄ must reach
    floors: Tensor  # fp32 [n]: what it must exceed
    targets: Tensor  # int64 [n]: the target's column; −1 where it is elsewhere
    first: int
    last: int
    k: int
    from_final: bool  # z̄ is the final layer's logit, else the mean of the layers'

    def shifted(self, begin: int, end: int, floors: Tensor) -> Gate:
        """The same for columns [begin, end) by themselves."""
        targets = self.targets - begin
        targets = targets.masked_fill((targets < 0) | (targets >= end - begin), -1)
        first, last = (min(max(edge, begin), end) - begin for edge in (self.first, self.last))
        return Gate(self.bars, floors, targets, first, last, self.k, self.from_final)


@dataclass(frozen=True)
class Listed:
    """The candidates of each row, by ascending column."""

    columns: Tensor  # int32 [n, k], −1 behind the last
    ensemble: Tensor  # fp32 [n, k] z̄, −inf behind the last
    z: Tensor  # fp32 [n, k] the final layer's logits, −inf behind the last
    found: Tensor  # int32 [n]: how many columns reach the bar, listed or not

    @staticmethod
    def empty(n: int, k: int, device: torch.device) -> Listed:
        low = torch.full((n, k), -torch.inf, device=device)
        none = torch.full((n, k), -1, dtype=torch.int32, device=device)
        return Listed(none, low, low, none.new_zeros(n))

    def floors(self) -> Tensor:
        """[n] what z̄ must exceed, at a higher column, to be among the k largest."""
        return self.ensemble.amin(1)

    def within(self, begin: int, end: int) -> Tensor:
        """`columns` of a slice [begin, end) by itself, −1 for those in another."""
        return (self.columns - begin).masked_fill_(
            (self.columns < begin) | (self.columns >= end), -1
        )

    def joined(self, other: Listed, begin: int) -> tuple[Listed, Tensor]:
        """With the candidates of a slice of higher columns, which begins at `begin`: the k largest, and the final layer's logits [n, k] of those that go."""
        k = self.columns.shape[1]
        after = (other.columns + begin).masked_fill_(other.columns < 0, -1)
        columns, z = torch.cat([self.columns, after], 1), torch.cat([self.z, other.z], 1)
        ensemble, order = torch.cat([self.ensemble, other.ensemble], 1).sort(
            dim=1, descending=True, stable=True
        )  # ties to the lower column
        columns, z = columns.gather(1, order), z.gather(1, order)
        by_column = (
            columns[:, :k].masked_fill(columns[:, :k] < 0, torch.iinfo(torch.int32).max).argsort(1)
        )
        columns, ensemble, kept_z = (
            values[:, :k].gather(1, by_column) for values in (columns, ensemble, z)
        )
        return Listed(columns, ensemble, kept_z, self.found + other.found), z[:, k:]
