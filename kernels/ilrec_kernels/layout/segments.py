"""Exponentials of rows, and reductions over ragged rows given as (row, value) entries.

All of them are deterministic on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634


def segment_sum(values: Tensor, row: Tensor, n: int) -> Tensor:
    """Return the sums [n] of values [P] by row [P], which ascends."""
    if values.is_cuda:
        return sum_between_edges(values, row, n)
    return values.new_zeros(n).index_add_(0, row, values)


def sum_between_edges(values: Tensor, row: Tensor, n: int) -> Tensor:
    """Compute segment_sum as on a GPU, where index_add_ would use atomics.

    Each row's values are added by themselves, without a sort and without a question to
    the device.
    """
    edges = row_edges(row, n)
    if not values.is_floating_point():
        # Whole numbers wrap around, so a difference of running sums is exact.
        return torch.cat([values.new_zeros(1), values.cumsum(0)]).take(edges).diff()
    if not values.numel():
        return values.new_zeros(n)
    return torch.segment_reduce(values.contiguous(), "sum", offsets=edges, unsafe=True)


def row_edges(row: Tensor, n: int) -> Tensor:
    """Return where each of n rows begins and ends among row [P], int64 [n + 1]."""
    return torch.searchsorted(row, torch.arange(n + 1, device=row.device))


def row_counts(row: Tensor, n: int) -> Tensor:
    """Return how often each of n rows occurs in row [P], which ascends; int64 [n].

    `bincount` would ask the device for the largest row.
    """
    return row_edges(row, n).diff()


def segment_max(values: Tensor, row: Tensor, n: int) -> Tensor:
    """Return the maxima [n] of values [P] by row [P], −inf for rows without any.

    A maximum does not depend on the order, so atomics do no harm here.
    """
    return values.new_full((n,), -torch.inf).scatter_reduce_(0, row, values, "amax")


def segment_logsumexp(values: Tensor, row: Tensor, n: int) -> Tensor:
    """Return the logsumexp [n] of values [P] by row [P], −inf for rows without any."""
    row_max = finite(segment_max(values, row, n))
    return row_max + segment_sum(torch.exp(values - row_max.take(row)), row, n).log_()


def set_key(token: Tensor, row: Tensor, n: int, member: Tensor | None = None) -> Tensor:
    """Return a fingerprint of each row's set of distinct tokens (int64 [P]), int64 [n].

    It is the wrapping sum of a 64-bit mix of each token, whatever their order. Only
    entries of `member` (bool [P]) count; None stands for all.
    """
    # These are splitmix64's increment and multipliers, as signed numbers.
    mixed = (token + 1) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    mixed = mixed ^ (mixed >> 31)
    return segment_sum(mixed if member is None else mixed.masked_fill_(~member, 0), row, n)


def finite(row_max: Tensor) -> Tensor:
    """Return maxima that may be subtracted: 0 for a row without values (−inf)."""
    return row_max.masked_fill(row_max == -torch.inf, 0.0)


def exp_below(z: Tensor, row_max: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute e^(z − row_max) of z [n, c] and row_max [n], into `out` or in place.

    It is computed as a power of two, which torch does several times as fast on CPUs.
    """
    target = z if out is None else out
    return torch.sub(z, finite(row_max)[:, None], out=target).mul_(LOG2_E).exp2_()


def add_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values to out[index] by rows, with repeated indices, deterministically."""
    if out.is_cuda:
        out.index_put_((index,), values, accumulate=True)
    else:
        out.index_add_(0, index, values)
