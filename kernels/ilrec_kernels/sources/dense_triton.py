"""Dense logits of a chunk, stored and passed over by Triton's row kernels: regime T.

One kernel makes all statistics and collects the candidates, one turns logits into
gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilrec_kernels.chunk import Chunk, ChunkGradients, Factors
from ilrec_kernels.layout.segments import finite
from ilrec_kernels.layout.vocab_columns import select_columns
from ilrec_kernels.plan import Plan
from ilrec_kernels.problem import Problem
from ilrec_kernels.steps.head_product import HeadProduct, multiply_with_head
from ilrec_kernels.steps.logits import DenseLogits
from ilrec_kernels.steps.negatives import (
    buffered_candidates,
    candidate_filter,
    propose_dense,
    set_ensemble_target,
)
from ilrec_kernels.triton.candidate_buffer import CandidateBuffer
from ilrec_kernels.triton.launch import (
    BufferedGradients,
    DenseRows,
    logits_to_gradients,
    row_statistics,
)


class DenseTriton:
    """The dense scopes of one chunk.

    buffer        what the statistics kernel collected; None where it collects nothing
    buffer_index  int64 [E]: where in the buffer each candidate lies; None: all places
                  of it are candidates
    """

    def __init__(self, p: Problem, plan: Plan, z: DenseLogits) -> None:
        self.p, self.plan, self.z = p, plan, z
        self.buffer: CandidateBuffer | None = None
        self.buffer_index: Tensor | None = None

    def statistics(self, chunk: Chunk) -> None:
        p, plan, stats = self.p, self.plan, chunk.stats
        accept = None
        if plan.kernel_finds_negatives:
            set_ensemble_target(p, plan, chunk, self.z)
            accept = candidate_filter(p, plan, chunk)
        elif plan.negatives.is_dense:
            chunk.candidates = propose_dense(p, plan, chunk, self.z)
        excluded = None
        if plan.softmax.is_dense and chunk.candidates.logit_index.numel():
            excluded = torch.zeros(self.z.final.shape, dtype=torch.int8, device=p.head.device)
            excluded.view(-1).index_fill_(0, chunk.candidates.logit_index, 1)
        reads_layers = plan.distill.is_dense or (accept is not None and not accept.from_final)
        rows = self._rows(self.z.layers if reads_layers else self.z.layers[:0])
        parts, self.buffer = row_statistics(rows, excluded, accept)
        if plan.softmax.is_dense:
            stats.z_target = self.z.final_targets(chunk)
            stats.row_max, stats.sum_exp = parts.row_max, parts.sum_exp
        if plan.distill.is_dense:
            stats.teacher_max, stats.teacher_sum = parts.teacher_max, parts.teacher_sum
            stats.layer_max, stats.layer_sum = parts.layer_max, parts.layer_sum
            stats.cross = parts.cross
        if self.buffer is not None:
            chunk.candidates, self.buffer_index = buffered_candidates(p, plan, chunk, self.buffer)

    def backward(
        self, chunk: Chunk, factors: Factors, gradients: ChunkGradients
    ) -> list[HeadProduct]:
        p, plan, z = self.p, self.plan, self.z
        distilled = plan.distill.is_dense and factors.distill is not None
        rows = self._rows(z.layers if distilled else z.layers[:0])
        table = factor_table(chunk, factors, rows.distilled_layers, plan.softmax.is_dense)
        target = chunk.y.masked_fill(~chunk.owned, -1)
        buffered = None
        if plan.softmax.is_dense and self.buffer is not None:
            values = buffer_gradients(self.buffer, self.buffer_index, factors)
            buffered = BufferedGradients(self.buffer.columns, values)
        final, layers = logits_to_gradients(rows, table, target, p.head.dtype, buffered)
        if plan.softmax.is_dense and buffered is None and factors.candidates.numel():
            index, columns = chunk.candidates.logit_index, final.shape[1]
            final[index // columns, index % columns] = factors.candidates.to(final.dtype)
        students = layers[:0]
        if distilled:
            within = plan.distill.columns.within(plan.layers.columns)
            students = select_columns(layers, within)
        self.z = DenseLogits(final, layers if distilled else z.layers)
        return multiply_with_head(p, plan, chunk, self.z, students, gradients.hidden)

    def _rows(self, layers: Tensor) -> DenseRows:
        """Return the logits with the distill columns relative to the final layer's."""
        plan, first = self.plan, self.plan.final.columns.start
        distill, shift = (0, 0), 0
        if plan.layers.is_dense:
            shift = plan.layers.columns.start - first
            if plan.distill.is_dense:
                columns = plan.distill.columns
                distill = columns.start - first, columns.stop - first
        return DenseRows(self.z.final, layers, distill, shift, plan.softmax.is_dense)


def factor_table(chunk: Chunk, factors: Factors, layers: int, softmax: bool) -> Tensor:
    """Return the row factors as gradients_kernel reads them, [n, 5 + 2·layers]."""
    stats = chunk.stats
    table = factors.final.new_zeros(chunk.n, 5 + 2 * layers)
    if softmax:
        columns = (finite(stats.row_max), factors.final, factors.target)
        table[:, 0], table[:, 1], table[:, 2] = columns
    if layers and factors.distill is not None:
        table[:, 3], table[:, 4] = finite(stats.teacher_max), factors.distill.teacher
        table[:, 5 : 5 + layers] = finite(stats.layer_max).T
        table[:, 5 + layers :] = factors.distill.layer.T
    return table


def buffer_gradients(buffer: CandidateBuffer, index: Tensor | None, factors: Factors) -> Tensor:
    """Return the candidates' gradients [n, k], each where its candidate lies."""
    shape = buffer.columns.shape
    if index is None:
        return factors.candidates.view(shape)
    values = factors.candidates.new_zeros(shape.numel())
    return values.index_copy_(0, index, factors.candidates).view(shape)
