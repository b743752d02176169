"""What a rank tells the others about a chunk of rows (METHOD.md §7), sent while other work goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels.problem import Problem
from ilrec_kernels.segments import row_counts


@dataclass
class Sent:
    """The entries a rank proposes for H, ascending by (row, token): what it leaves out of its normaliser."""

    row: Tensor  # int64 [E]
    token: Tensor  # int64 [E], global
    ensemble: Tensor  # z̄ [E]
    z: Tensor  # z^L [E]
    slot: Tensor  # int64 [E]: where the final layer's logit sits on this rank; −1 outside the softmax scope
    pair: Tensor | None = None  # int64 [E]: position among this rank's pairs, where it is known
    over: Tensor | None = (
        None  # bool [n], where the entries are H itself already: rows that had more than k
    )
    member: Tensor | None = (
        None  # bool [E], where every row has as many entries: those that are any; the others' logits are −inf
    )


def empty_sent(p: Problem) -> Sent:
    """None."""
    index, value = (
        torch.zeros(0, dtype=dtype, device=p.head.device) for dtype in (torch.int64, p.dtype)
    )
    return Sent(index, index, value, value, index)


@dataclass
class RankStats:
    """A rank's part of a chunk's statistics: [n], those of the layers [m, n]."""

    z_target: Tensor  # z^L(y) on its owner, else 0
    ensemble_target: Tensor  # z̄(y) on its owner, else 0
    top: Tensor  # final layer over the softmax scope, without the sent entries
    rest: Tensor
    teacher_top: Tensor  # final layer over the distill scope
    teacher_rest: Tensor
    layer_top: Tensor  # layers over the distill scope
    layer_rest: Tensor
    cross: Tensor  # Σ e^(z^L − teacher_top)·(z^L − z^l)

    @staticmethod
    def zeros(n: int, m: int, dtype: torch.dtype, device: torch.device) -> RankStats:
        def full(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        low = -math.inf
        return RankStats(
            full(0, n),
            full(0, n),
            full(low, n),
            full(0, n),
            full(low, n),
            full(0, n),
            full(low, m, n),
            full(0, m, n),
            full(0, m, n),
        )


@dataclass
class Gathered:
    """All ranks' statistics with a leading rank dimension, and all proposed entries, ascending by (row, rank, token)."""

    stats: RankStats
    row: Tensor
    token: Tensor
    ensemble: Tensor
    z: Tensor
    pair: Tensor | None  # int64: position among the pairs, where it is known
    mine: Tensor | None  # int64: this rank's entries among all; None: all of them
    over: Tensor | None = None  # as in Sent
    member: Tensor | None = None  # as in Sent


class Exchange:
    """One all-gather of everything a chunk needs from the other ranks: under way from here until `wait`."""

    def __init__(self, stats: RankStats, sent: Sent, p: Problem) -> None:
        self.stats, self.sent, self.group = stats, sent, p.group
        if p.group is None:
            return
        values = [getattr(stats, f.name) for f in fields(RankStats)]
        n, dtype = stats.top.shape[0], stats.top.dtype
        self.integer = torch.int64 if dtype == torch.float64 else torch.int32
        self.width = p.options.max_negatives + 1 if p.options.needs_negatives else 0
        count = row_counts(sent.row, n)
        place = torch.arange(sent.row.numel(), device=sent.row.device) - (
            count.cumsum(0) - count
        ).take(sent.row)
        parts = [v.T if v.dim() == 2 else v[:, None] for v in values] + [
            count.to(self.integer)[:, None].view(dtype)
        ]
        for entries in (
            (sent.ensemble, sent.z, sent.token.to(self.integer).view(dtype)) if self.width else ()
        ):
            padded = torch.zeros(n, self.width, dtype=dtype, device=count.device)
            padded[sent.row, place] = entries
            parts.append(padded)
        self.sizes = [part.shape[1] for part in parts]
        self.message = torch.cat(parts, 1)
        self.everything = self.message.new_empty(dist.get_world_size(p.group), *self.message.shape)
        self.work = dist.all_gather_into_tensor(
            self.everything.flatten(0, 1), self.message, group=p.group, async_op=True
        )

    def wait(self) -> Gathered:
        sent, values = self.sent, [getattr(self.stats, f.name) for f in fields(RankStats)]
        if self.group is None:
            return Gathered(
                RankStats(*(v[None] for v in values)),
                sent.row,
                sent.token,
                sent.ensemble,
                sent.z,
                sent.pair,
                None,
                sent.over,
                sent.member,
            )
        self.work.wait()
        pieces = self.everything.split(self.sizes, 2)
        merged = [
            piece.transpose(1, 2) if v.dim() == 2 else piece[..., 0]
            for v, piece in zip(values, pieces, strict=False)
        ]
        counts = pieces[len(values)][..., 0].contiguous().view(self.integer)  # [R, n]
        if not self.width:
            return Gathered(
                RankStats(*merged), sent.row, sent.token, sent.ensemble, sent.z, None, None
            )
        listed = (
            torch.arange(self.width, device=counts.device) < counts.T[:, :, None]
        )  # [n, R, width]
        row, rank, place = listed.nonzero(as_tuple=True)
        ensemble, z, token = (piece[rank, row, place] for piece in pieces[-3:])
        mine = torch.nonzero_static(
            rank == dist.get_rank(self.group), size=sent.row.numel()
        ).flatten()
        return Gathered(
            RankStats(*merged), row, token.view(self.integer).long(), ensemble, z, None, mine
        )
