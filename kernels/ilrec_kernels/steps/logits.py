"""The first step of a chunk: its hidden rows, targets and lists, and dense logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.chunk import Chunk, Scratch
from ilrec_kernels.layout.candidate_entries import CandidateEntries, Span, span_entries
from ilrec_kernels.layout.gemm import project
from ilrec_kernels.plan import Plan
from ilrec_kernels.problem import Problem
from ilrec_kernels.steps.softmax_stats import RankStats
from ilrec_kernels.steps.tp_exchange import Candidates


def start_chunk(
    p: Problem,
    plan: Plan,
    scratch: Scratch,
    span: Span,
    complete: bool,
    ensemble_bound: Tensor | None,
) -> Chunk:
    """Gather the rows of a span; `complete` as of spans_with_all_targets."""
    begin, end = span.begin, span.end
    n, device = end - begin, p.targets.device
    x = torch.stack([h[begin:end].to(p.row_dtype) for h in p.hidden[: plan.streams]])
    y = p.targets[begin:end] - p.start
    owned = (y >= 0) & (y < p.stop - p.start)
    entries = local_entries = CandidateEntries.empty(n, device)
    if plan.needs_entries and p.candidates is not None:
        entries = span_entries(p.candidates, p.targets, span, complete)
        local_entries = entries if p.group is None else entries.in_shard(p.start, p.stop)
    return Chunk(
        begin,
        end,
        x,
        y.masked_fill_(~owned, 0),
        owned,
        torch.arange(n, device=device),
        entries,
        local_entries,
        scratch,
        RankStats.empty(n, plan.streams - 1, p.dtype, p.head.device),
        Candidates.empty(p.dtype, p.head.device),
        None if ensemble_bound is None else ensemble_bound[begin:end],
    )


@dataclass
class DenseLogits:
    """A chunk's dense logits, which become exponentials and then gradients in place.

    `layers` has no streams where no intermediate layer has dense logits.
    """

    final: Tensor  # [n, c]
    layers: Tensor  # [m, n, c']

    def final_targets(self, chunk: Chunk) -> Tensor:
        """Return z^L(y) [n] on y's owner, 0 elsewhere."""
        if not self.final.shape[1]:
            return self.final.new_zeros(chunk.n)
        return self.final[chunk.row, chunk.y].masked_fill_(~chunk.owned, 0.0)


def make_dense_logits(p: Problem, plan: Plan, chunk: Chunk) -> DenseLogits:
    """Project the chunk's rows into its scratch memory, in one product
    where possible.
    """
    x, n, m = chunk.x, chunk.n, plan.layer_streams
    final, layers, memory = plan.final.columns, plan.layers.columns, chunk.scratch.logits
    if plan.one_product:
        z = memory[: (1 + m) * n * len(final)].view(1 + m, n, len(final))
        project(x.flatten(0, 1), p.head, final, z.flatten(0, 1), plan.block)
        return DenseLogits(z[0], z[1:])
    used = n * len(final)
    z_final = memory[:used].view(n, len(final))
    project(x[0], p.head, final, z_final, plan.block)
    z_layers = memory[used : used + m * n * len(layers)].view(m, n, len(layers))
    if m:
        project(x[1:].flatten(0, 1), p.head, layers, z_layers.flatten(0, 1), plan.block)
    return DenseLogits(z_final, z_layers)
