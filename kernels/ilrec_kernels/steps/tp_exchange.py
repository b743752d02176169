"""What a rank tells the others about a chunk of rows (METHOD.md §7).

One all-gather a chunk carries it, while other work goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels.layout.segments import row_counts
from ilrec_kernels.problem import Problem
from ilrec_kernels.steps.softmax_stats import RankStats


@dataclass(frozen=True)
class Selection:
    """H as a rank alone could already decide it.

    member  bool [E]; None: every candidate is in H. Where candidates have a fixed
            width, the others are padding, with logits of −inf
    capped  bool [n]: rows that had more than k candidates
    """

    member: Tensor | None
    capped: Tensor


@dataclass(frozen=True)
class Candidates:
    """The tokens a rank proposes for H, ascending by (row, token).

    They are what it leaves out of its normaliser.

    ensemble     z̄
    z            z^L
    logit_index  where the final layer's logit lies in the rank's flat matrix (or, with
                 the masked softmax, among its list entries); −1 outside the softmax
                 scope
    entry        index among the rank's list entries, where it is known
    selection    given where the candidates are decided already
    """

    row: Tensor  # int64 [E]
    token: Tensor  # int64 [E], global
    ensemble: Tensor  # [E]
    z: Tensor  # [E]
    logit_index: Tensor  # int64 [E]
    entry: Tensor | None = None
    selection: Selection | None = None

    @staticmethod
    def empty(dtype: torch.dtype, device: torch.device) -> Candidates:
        index = torch.zeros(0, dtype=torch.int64, device=device)
        value = torch.zeros(0, dtype=dtype, device=device)
        return Candidates(index, index, value, value, index)


@dataclass(frozen=True)
class Gathered:
    """All ranks' statistics and candidates.

    stats       with a leading rank dimension
    candidates  ascending by (row, rank, token); with other ranks no entry, no
                selection, and logit_index is this rank's
    mine        int64: this rank's candidates among all; None: all of them
    """

    stats: RankStats
    candidates: Candidates
    mine: Tensor | None

    def take_mine(self, values: Tensor) -> Tensor:
        """Return this rank's part of values [E] of all candidates."""
        return values if self.mine is None else values.take(self.mine)


class Exchange:
    """One all-gather of a chunk's statistics, in flight from here until `wait`."""

    def __init__(self, stats: RankStats, candidates: Candidates, p: Problem) -> None:
        self.stats, self.candidates, self.group = stats, candidates, p.group
        if p.group is None:
            return
        n, dtype, device = stats.row_max.shape[0], stats.row_max.dtype, stats.row_max.device
        # Token ids and counts travel as bit patterns of the statistics' width.
        self.integer = torch.int64 if dtype == torch.float64 else torch.int32
        self.width = p.options.max_negatives + 1 if p.options.needs_negatives else 0
        count = row_counts(candidates.row, n)
        parts = [v.T if v.dim() == 2 else v[:, None] for v in _values(stats)]
        parts.append(count.to(self.integer)[:, None].view(dtype))
        if self.width:
            first = count.cumsum(0) - count
            position = torch.arange(candidates.row.numel(), device=device)
            position = position - first.take(candidates.row)
            token = candidates.token.to(self.integer).view(dtype)
            for values in (candidates.ensemble, candidates.z, token):
                padded = torch.zeros(n, self.width, dtype=dtype, device=device)
                padded[candidates.row, position] = values
                parts.append(padded)
        self.sizes = [part.shape[1] for part in parts]
        self.message = torch.cat(parts, 1)
        self.received = self.message.new_empty(dist.get_world_size(p.group), *self.message.shape)
        self.work = dist.all_gather_into_tensor(
            self.received.flatten(0, 1), self.message, group=p.group, async_op=True
        )

    def wait(self) -> Gathered:
        candidates, values = self.candidates, _values(self.stats)
        if self.group is None:
            return Gathered(RankStats(*(v[None] for v in values)), candidates, None)
        self.work.wait()
        pieces = torch.split(self.received, self.sizes, 2)
        stats = RankStats(
            *(
                piece.transpose(1, 2) if v.dim() == 2 else piece[..., 0]
                for v, piece in zip(values, pieces, strict=False)
            )
        )
        if not self.width:
            return Gathered(stats, candidates, None)
        counts = pieces[len(values)][..., 0].contiguous().view(self.integer)  # [R, n]
        columns = torch.arange(self.width, device=counts.device)
        is_candidate = columns < counts.T[:, :, None]  # [n, R, width]
        row, rank, position = is_candidate.nonzero(as_tuple=True)
        ensemble, z, token = (piece[rank, row, position] for piece in pieces[-3:])
        mine = torch.nonzero_static(
            rank == dist.get_rank(self.group), size=candidates.row.numel()
        ).flatten()
        everyone = replace(
            candidates,
            row=row,
            token=token.view(self.integer).long(),
            ensemble=ensemble,
            z=z,
            entry=None,
            selection=None,
        )
        return Gathered(stats, everyone, mine)


def _values(stats: RankStats) -> list[Tensor]:
    return [getattr(stats, field.name) for field in fields(RankStats)]
