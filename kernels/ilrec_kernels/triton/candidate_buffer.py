"""Candidates for H as fixed-width buffers, and which columns may enter them.

Fixed-width buffers [n, k] avoid a device-to-host sync to learn how many candidates each
row has. The row kernels fill them, and take the candidates' gradients in the same form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Candidates that a row kernel keeps for a row while it looks for the k largest: at least
# k and those of one part of a block.
BUFFER_SIZE = 512


@dataclass(frozen=True)
class CandidateFilter:
    """Which columns of a matrix of logits are candidates (METHOD.md §2).

    They are up to k of [first, last), without the target's column, by z̄: the final
    layer's logit with `from_final`, otherwise the mean of the layers' logits.

    thresholds  what z̄ must reach
    kth_values  what z̄ must exceed
    targets     the target's column; −1 where it is elsewhere
    """

    thresholds: Tensor  # fp32 [n]
    kth_values: Tensor  # fp32 [n]
    targets: Tensor  # int64 [n]
    first: int
    last: int
    k: int
    from_final: bool

    def overlaps(self, begin: int, end: int) -> bool:
        """Whether columns [begin, end) hold any that may be candidates."""
        return self.first < end and self.last > begin

    def shifted(self, begin: int, end: int, kth_values: Tensor) -> CandidateFilter:
        """Return the same filter for columns [begin, end) by themselves."""
        targets = self.targets - begin
        targets = targets.masked_fill((targets < 0) | (targets >= end - begin), -1)
        first, last = (min(max(edge, begin), end) - begin for edge in (self.first, self.last))
        return CandidateFilter(
            self.thresholds, kth_values, targets, first, last, self.k, self.from_final
        )


@dataclass(frozen=True)
class CandidateBuffer:
    """The candidates of each row, by ascending column.

    columns   −1 behind the last candidate
    ensemble  z̄, −inf behind the last
    z         the final layer's logits, −inf behind the last
    passed    how many columns reach the threshold, kept in the buffer or not
    """

    columns: Tensor  # int32 [n, k]
    ensemble: Tensor  # fp32 [n, k]
    z: Tensor  # fp32 [n, k]
    passed: Tensor  # int32 [n]

    @staticmethod
    def empty(n: int, k: int, device: torch.device) -> CandidateBuffer:
        low = torch.full((n, k), -torch.inf, device=device)
        columns = torch.full((n, k), -1, dtype=torch.int32, device=device)
        return CandidateBuffer(columns, low, low, columns.new_zeros(n))

    def kth_values(self) -> Tensor:
        """Return what z̄ [n] of a higher column must exceed to be among the
        k largest.
        """
        return self.ensemble.amin(1)

    def columns_within(self, begin: int, end: int) -> Tensor:
        """Return `columns` relative to the slice [begin, end), −1 for those
        outside it.
        """
        outside = (self.columns < begin) | (self.columns >= end)
        return (self.columns - begin).masked_fill_(outside, -1)

    def merged(self, other: CandidateBuffer, begin: int) -> tuple[CandidateBuffer, Tensor]:
        """Merge the candidates of a slice of higher columns, which begins at `begin`.

        Returns the k largest, and the final layer's logits [n, k] of those evicted.
        """
        k = self.columns.shape[1]
        other_columns = (other.columns + begin).masked_fill_(other.columns < 0, -1)
        columns, z = torch.cat([self.columns, other_columns], 1), torch.cat([self.z, other.z], 1)
        # The sort is stable, so ties go to the lower column.
        ensemble, order = torch.cat([self.ensemble, other.ensemble], 1).sort(
            dim=1, descending=True, stable=True
        )
        columns, z = columns.gather(1, order), z.gather(1, order)
        evicted = z[:, k:]
        kept = columns[:, :k]
        by_column = kept.masked_fill(kept < 0, torch.iinfo(torch.int32).max).argsort(1)
        columns, ensemble, kept_z = (
            values[:, :k].gather(1, by_column) for values in (columns, ensemble, z)
        )
        return CandidateBuffer(columns, ensemble, kept_z, self.passed + other.passed), evicted
