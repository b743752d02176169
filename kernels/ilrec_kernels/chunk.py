"""The state of a chunk of rows between its logits and its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.layout.candidate_entries import CandidateEntries
from ilrec_kernels.layout.head_gradient import HeadGradient
from ilrec_kernels.plan import Plan
from ilrec_kernels.problem import DenseSource, Problem
from ilrec_kernels.steps.softmax_stats import RankStats
from ilrec_kernels.steps.tp_exchange import Candidates


@dataclass(frozen=True)
class Scratch:
    """Memory that the chunks of a call share, so that pages are faulted in only once.

    `tiles` is for a few tiles at a time and keeps nothing; chunks in flight share it.
    """

    logits: Tensor  # flat
    teacher: Tensor  # flat
    tiles: Tensor  # flat

    @staticmethod
    def allocate(p: Problem, plan: Plan, count: int) -> list[Scratch]:
        """Allocate the memory of `count` chunks that are in flight at once."""
        rows = 0 if plan.source is DenseSource.SLICES else min(plan.chunk_rows, p.n)

        def memory(size: int) -> Tensor:
            return torch.empty(size, dtype=p.dtype, device=p.head.device)

        tiles = memory(plan.scratch_values)
        return [
            Scratch(memory(rows * plan.row_logits), memory(rows * plan.row_teacher), tiles)
            for _ in range(count)
        ]

    def tile(self, rows: slice, columns: int) -> Tensor:
        """Return uninitialised memory [rows, columns]."""
        count = rows.stop - rows.start
        return self.tiles[: count * columns].view(count, columns)


@dataclass
class Chunk:
    """Rows [begin, end) of a call.

    x              the streams' hidden rows, in the problem's row_dtype
    y              the target's local column; 0 where another rank owns it
    owned          this rank owns the target
    row            0 … n − 1
    entries        the rows' lists over the whole vocabulary; empty where none are
                   needed
    local_entries  those of this rank's shard
    ensemble_bound z̄(y) as known to all ranks before the chunk's own logits, for a
                   pre-filter; None: the chunk's own z̄(y) is exact here
    candidates     set by the source that proposes negatives, before the others'
                   statistics
    """

    begin: int
    end: int
    x: Tensor  # [S, n, d]
    y: Tensor  # int64 [n]
    owned: Tensor  # bool [n]
    row: Tensor  # int64 [n]
    entries: CandidateEntries
    local_entries: CandidateEntries
    scratch: Scratch
    stats: RankStats
    candidates: Candidates
    ensemble_bound: Tensor | None

    @property
    def n(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class DistillFactors:
    """What the exponentials of the distill scope are multiplied by (METHOD.md §4)."""

    teacher: Tensor  # [n], negative
    layer: Tensor  # [m, n]


@dataclass(frozen=True)
class Factors:
    """What a chunk's exponentials are multiplied by to become gradients.

    final       of e^(z − row_max): the cross-entropy's share and the soft label's
    target      what the target's logit gets besides
    candidates  the whole gradient at the rank's candidates
    distill     None without distillation
    """

    final: Tensor  # [n]
    target: Tensor  # [n]
    candidates: Tensor  # [E]
    distill: DistillFactors | None


@dataclass
class Gradients:
    """Where a call's gradients go; None where none is wanted.

    `scale` [N] multiplies each row's loss.
    """

    hidden: list[Tensor | None]
    head: HeadGradient | None
    scale: Tensor


@dataclass(frozen=True)
class ChunkGradients:
    """Where a chunk's sources add their gradients; `head` is None where it
    is frozen.
    """

    hidden: Tensor  # [S, n, d]
    head: HeadGradient | None
