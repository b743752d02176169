"""Logits made a slice of the vocabulary at a time, by Triton's row kernels: regime V.

They are made once for the statistics and once for the gradients. This serves a
vocabulary so large, or a workspace so small, that regime T's chunks would be a few
hundred rows: there the products would be bound by reading the head again for every
chunk. Here thousands of rows meet a slice of the head at once, and each chunk writes
each slice of the head's gradient once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.chunk import Chunk, ChunkGradients, Factors
from ilrec_kernels.layout.gemm import hidden_gradient, project, weight_gradient
from ilrec_kernels.layout.segments import finite
from ilrec_kernels.layout.vocab_columns import VocabColumns
from ilrec_kernels.plan import Plan
from ilrec_kernels.problem import Problem
from ilrec_kernels.sources.dense_triton import buffer_gradients, factor_table
from ilrec_kernels.steps.head_product import HeadProduct
from ilrec_kernels.steps.negatives import buffered_candidates, candidate_filter, ensemble_mean
from ilrec_kernels.steps.softmax_stats import RankStats, combine
from ilrec_kernels.triton.candidate_buffer import CandidateBuffer, CandidateFilter
from ilrec_kernels.triton.launch import (
    BufferedGradients,
    DenseRows,
    RowParts,
    logits_to_gradients,
    row_statistics,
)


@dataclass(frozen=True)
class Slice:
    """Some columns of a chunk's logits; outside the distill scope the final layer's
    alone.

    begin       the first column, within the final layer's columns
    target      the target's column in the slice, −1 where it is in another
    distill     (first, last + 1) distill column in the slice
    candidates  which of the chunk's listed candidates lie here
    row, column where they lie in the slice
    """

    begin: int
    columns: VocabColumns
    x: Tensor  # [streams · n, d]
    z: Tensor  # [streams, n, w]
    target: Tensor  # int64 [n]
    distill: tuple[int, int]
    candidates: Tensor  # int64 [E]
    row: Tensor  # int64 [E]
    column: Tensor  # int64 [E]

    @property
    def end(self) -> int:
        return self.begin + len(self.columns)

    @property
    def rows(self) -> DenseRows:
        return DenseRows(self.z[0], self.z[1:], self.distill, 0, softmax=True)


class VocabSlices:
    """The dense scopes of one chunk.

    buffer        the candidates that the statistics kernel collected; None where the
                  negatives are not its scope
    buffer_index  as in DenseTriton
    """

    def __init__(self, p: Problem, plan: Plan) -> None:
        self.p, self.plan = p, plan
        self.buffer: CandidateBuffer | None = None
        self.buffer_index: Tensor | None = None

    def statistics(self, chunk: Chunk) -> None:
        accept = None
        if self.plan.kernel_finds_negatives:
            accept = candidate_filter(self.p, self.plan, chunk)
            self.buffer = CandidateBuffer.empty(chunk.n, accept.k, chunk.row.device)
        for s in self._slices(chunk, accept):
            self._add_statistics(chunk, s, accept)
        if self.buffer is not None:
            chunk.candidates, self.buffer_index = buffered_candidates(
                self.p, self.plan, chunk, self.buffer
            )

    def backward(
        self, chunk: Chunk, factors: Factors, gradients: ChunkGradients
    ) -> list[HeadProduct]:
        p, plan = self.p, self.plan
        tables = {
            streams: factor_table(chunk, factors, streams - 1, softmax=True)
            for streams in {1, plan.streams}
        }
        values = None
        if self.buffer is not None:
            values = buffer_gradients(self.buffer, self.buffer_index, factors)
        for s in self._slices(chunk, None):
            streams, buffered = s.z.shape[0], None
            if self.buffer is not None and values is not None:
                columns = self.buffer.columns_within(s.begin, s.end)
                buffered = BufferedGradients(columns, values)
            g, _ = logits_to_gradients(s.rows, tables[streams], s.target, p.head.dtype, buffered)
            if buffered is None:
                g[s.row, s.column] = factors.candidates.take(s.candidates).to(g.dtype)
            # The layers' gradients follow the final layer's in memory.
            stacked = g.as_strided((streams * chunk.n, g.shape[1]), g.stride())
            hidden = gradients.hidden[:streams].flatten(0, 1)
            hidden_gradient(stacked, p.head, s.columns, hidden, plan.block, accumulate=True)
            if gradients.head is not None:
                first, last = gradients.head.overlap(s.columns.start, s.columns.stop)
                if first < last:
                    part = stacked[:, first - s.columns.start : last - s.columns.start]
                    head = gradients.head.range(first, last)
                    weight_gradient(part, s.x, p.head, head, plan.block)
        return []

    def _slices(self, chunk: Chunk, accept: CandidateFilter | None) -> Iterator[Slice]:
        """Yield all slices, ascending, one after the other in the same memory.

        The layers' logits are made where they are
        distilled, or where `accept` needs them.
        """
        p, plan, n, width = self.p, self.plan, chunk.n, self.plan.slice_columns
        c, first = len(plan.final), plan.final.columns.start
        low, high = 0, 0
        if plan.distill.is_dense:
            low, high = plan.distill.columns.start - first, plan.distill.columns.stop - first
        # The buffer says itself which candidates lie in a slice.
        index = chunk.candidates.logit_index
        if plan.kernel_finds_negatives:
            index = index[:0]
        row, column = index // max(c, 1), index % max(c, 1)
        # Sorted by column, a slice's candidates are a range.
        order = torch.argsort(column, stable=True)
        bounds = torch.arange(0, c + width, width, device=column.device)
        edges = torch.searchsorted(column.take(order), bounds).tolist()
        values = plan.streams * n * min(width, c)
        memory = torch.empty(values, dtype=p.dtype, device=p.head.device)
        for number, begin in enumerate(range(0, c, width)):
            end = min(c, begin + width)
            distill = (min(max(low, begin), end) - begin, min(max(high, begin), end) - begin)
            filtered = accept is not None and not accept.from_final and accept.overlaps(begin, end)
            streams = plan.streams if distill[1] > distill[0] or filtered else 1
            columns = VocabColumns(first + begin, first + end)
            x = chunk.x[:streams].flatten(0, 1)
            z = memory[: streams * n * (end - begin)].view(streams, n, end - begin)
            project(x, p.head, columns, z.flatten(0, 1), plan.block)
            y = chunk.y - first - begin
            target = y.masked_fill(~chunk.owned | (y < 0) | (y >= end - begin), -1)
            here = order[edges[number] : edges[number + 1]]
            yield Slice(
                begin,
                columns,
                x,
                z,
                target,
                distill,
                here,
                row.take(here),
                column.take(here) - begin,
            )

    def _add_statistics(self, chunk: Chunk, s: Slice, accept: CandidateFilter | None) -> None:
        """Combine a slice's statistics with those of the slices before it."""
        z, stats = s.z[0], chunk.stats
        excluded = None
        if s.candidates.numel():
            excluded = torch.zeros(z.shape, dtype=torch.int8, device=z.device)
            excluded[s.row, s.column] = 1
        accept_here = None
        if accept is not None and self.buffer is not None and accept.overlaps(s.begin, s.end):
            accept_here = accept.shifted(s.begin, s.end, self.buffer.kth_values())
            streams = s.z[:1] if accept.from_final else s.z[1:]
            index = accept_here.targets.clamp(min=0)
            at_target = ensemble_mean(streams[:, chunk.row, index])
            stats.ensemble_target += at_target.masked_fill_(accept_here.targets < 0, 0.0)
        parts, collected = row_statistics(s.rows, excluded, accept_here)
        at_target = z[chunk.row, s.target.clamp(min=0)]
        stats.z_target += at_target.masked_fill_(s.target < 0, 0.0)
        _combine_softmax(stats, parts.row_max, parts.sum_exp)
        if collected is not None and self.buffer is not None:
            self.buffer, evicted = self.buffer.merged(collected, s.begin)
            # The normaliser left the evicted candidates out.
            row_max = evicted.amax(1)
            _combine_softmax(stats, row_max, torch.exp(evicted - finite(row_max)[:, None]).sum(1))
        if s.distill[1] > s.distill[0]:
            _combine_distillation(stats, parts)


def _combine_softmax(stats: RankStats, row_max: Tensor, sum_exp: Tensor) -> None:
    stats.row_max, stats.sum_exp, _, _ = combine(stats.row_max, stats.sum_exp, row_max, sum_exp)


def _combine_distillation(stats: RankStats, parts: RowParts) -> None:
    stats.teacher_max, stats.teacher_sum, before, here = combine(
        stats.teacher_max, stats.teacher_sum, parts.teacher_max, parts.teacher_sum
    )
    stats.layer_max, stats.layer_sum, _, _ = combine(
        stats.layer_max, stats.layer_sum, parts.layer_max, parts.layer_sum
    )
    stats.cross = before * stats.cross + here * parts.cross
