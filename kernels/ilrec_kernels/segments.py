"""Exponentials of rows, and reductions over ragged rows given as (row, value) pairs, deterministic on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, row: Tensor, n: int) -> Tensor:
    """[n] sums of values [P] by row [P], ascending."""
    return (
        sum_between_edges(values, row, n)
        if values.is_cuda
        else values.new_zeros(n).index_add_(0, row, values)
    )


def sum_between_edges(values: Tensor, row: Tensor, n: int) -> Tensor:
    """segment_sum as on a GPU, where index_add_ would use atomics: each row's values are added by themselves, and no sort or host is asked."""
    edges = row_edges(row, n)
    if (
        not values.is_floating_point()
    ):  # whole numbers wrap around: a difference of running sums is exact
        return torch.cat([values.new_zeros(1), values.cumsum(0)]).take(edges).diff()
    if not values.numel():
        return values.new_zeros(n)
    return torch.segment_reduce(values.contiguous(), "sum", offsets=edges, unsafe=True)


def row_edges(row: Tensor, n: int) -> Tensor:
    """int64 [n + 1]: where each of n rows begins and ends among row [P], ascending."""
    return torch.searchsorted(row, torch.arange(n + 1, device=row.device))


def row_counts(row: Tensor, n: int) -> Tensor:
    """int64 [n]: how often each row occurs in row [P], ascending. (bincount would ask the device for the largest.)"""
    return row_edges(row, n).diff()


def segment_max(values: Tensor, row: Tensor, n: int) -> Tensor:
    """[n] maxima of values [P] by row [P], −inf for rows without any. A maximum does not depend on the order."""
    return values.new_full((n,), -torch.inf).scatter_reduce_(0, row, values, "amax")


def segment_logsumexp(values: Tensor, row: Tensor, n: int) -> Tensor:
    """[n] logsumexp of values [P] by row [P], −inf for rows without any."""
    top = finite(segment_max(values, row, n))
    return top + segment_sum(torch.exp(values - top.take(row)), row, n).log_()


def set_key(token: Tensor, row: Tensor, n: int, member: Tensor | None = None) -> Tensor:
    """int64 [n]: a fingerprint of each row's set of distinct tokens (int64 [P]), whatever their order: the wrapping sum of a 64-bit mix of each.

    Only entries of `member` (bool [P]) count; None: all."""
    mixed = (
        token + 1
    ) * -7046029254386353131  # splitmix64's increment and multipliers, as signed numbers
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    mixed = mixed ^ (mixed >> 31)
    return segment_sum(mixed if member is None else mixed.masked_fill_(~member, 0), row, n)


def finite(top: Tensor) -> Tensor:
    """A row's maximum as something that may be subtracted: 0 where there is no value."""
    return top.masked_fill(top == -torch.inf, 0.0)


LOG2_E = 1.4426950408889634


def exp_below(z: Tensor, top: Tensor, out: Tensor | None = None) -> Tensor:
    """e^(z − top) of z [n, c] and top [n], into `out` or in place; as a power of two, which torch computes several times as fast on CPUs."""
    return torch.sub(z, finite(top)[:, None], out=z if out is None else out).mul_(LOG2_E).exp2_()


def add_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index] += values by rows, with repeated indices, deterministically."""
    if out.is_cuda:
        out.index_put_((index,), values, accumulate=True)
    else:
        out.index_add_(0, index, values)
