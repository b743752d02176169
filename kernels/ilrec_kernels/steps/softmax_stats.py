"""A rank's softmax statistics of a chunk (METHOD.md §7).

A softmax over some tokens is kept as (row_max, sum_exp): the maximum of the logits and
the sum of e^(z − row_max). Parts are combined by rescaling, so nothing overflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.layout.segments import exp_below, finite


@dataclass
class RankStats:
    """A rank's part of a chunk's statistics.

    z_target, ensemble_target  z^L(y) and z̄(y) on y's owner, 0 on the other ranks
    row_max, sum_exp           final layer over the softmax scope, without the
                               candidates that the rank sends
    teacher_max, teacher_sum   final layer over the distill scope
    layer_max, layer_sum       intermediate layers over the distill scope
    cross                      Σ e^(z^L − teacher_max)·(z^L − z^l)
    """

    z_target: Tensor  # [n]
    ensemble_target: Tensor  # [n]
    row_max: Tensor  # [n]
    sum_exp: Tensor  # [n]
    teacher_max: Tensor  # [n]
    teacher_sum: Tensor  # [n]
    layer_max: Tensor  # [m, n]
    layer_sum: Tensor  # [m, n]
    cross: Tensor  # [m, n]

    @staticmethod
    def empty(n: int, m: int, dtype: torch.dtype, device: torch.device) -> RankStats:
        """Return the statistics of no tokens."""

        def full(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        low = -math.inf
        return RankStats(
            z_target=full(0, n),
            ensemble_target=full(0, n),
            row_max=full(low, n),
            sum_exp=full(0, n),
            teacher_max=full(low, n),
            teacher_sum=full(0, n),
            layer_max=full(low, m, n),
            layer_sum=full(0, m, n),
            cross=full(0, m, n),
        )


def row_maxima(z: Tensor) -> Tensor:
    """Return the maxima [n] of z [n, c], −inf where there are no columns."""
    return z.amax(1) if z.shape[1] else z.new_full((z.shape[0],), -torch.inf)


def exponentiate(z: Tensor) -> tuple[Tensor, Tensor]:
    """Turn z [n, c] into e^(z − max) in place; return (row_max [n], sum_exp [n])."""
    row_max = row_maxima(z)
    return row_max, exp_below(z, row_max).sum(1)


def combine(
    row_max: Tensor, sum_exp: Tensor, other_max: Tensor, other_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Combine two parts; return (max, sum, rescaling of the first, of the second)."""
    highest = torch.maximum(row_max, other_max)
    first = torch.exp(row_max - finite(highest))
    second = torch.exp(other_max - finite(highest))
    return highest, first * sum_exp + second * other_sum, first, second


def logsumexp_over_ranks(row_max: Tensor, sum_exp: Tensor) -> Tensor:
    """Return the logsumexp of per-rank parts [R, …]."""
    if row_max.shape[0] == 1:
        return row_max[0] + sum_exp[0].log()
    highest = finite(row_max.amax(0))
    return highest + (sum_exp * torch.exp(row_max - highest)).sum(0).log()
