"""Logits at the rows' valid-next lists alone, on any device.

They are looked up in dense logits where those hold them, otherwise made for the lists
alone, at a cost in proportion to the lists (layout/ragged_gemm.py).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ilrec_kernels.chunk import Chunk, ChunkGradients, DistillFactors, Factors
from ilrec_kernels.layout.ragged_gemm import RaggedGemm
from ilrec_kernels.layout.segments import finite, segment_max, segment_sum
from ilrec_kernels.layout.vocab_columns import VocabColumns
from ilrec_kernels.plan import Plan
from ilrec_kernels.problem import Problem
from ilrec_kernels.steps.head_product import HeadProduct
from ilrec_kernels.steps.logits import DenseLogits
from ilrec_kernels.steps.negatives import ensemble_mean, propose_listed
from ilrec_kernels.steps.tp_exchange import Candidates


class CandidateLists:
    """The list scopes of one chunk, at this rank's P entries.

    z_final   [P] the final layer's logits, then exponentials, then gradients; empty
              where only candidates' logits are needed, which are looked up in the dense
              ones
    z_layers  [m, P] the layers' logits, likewise; m = 0 where no term needs them
    teacher   [P] e^(z^L − teacher_max), with distillation over the lists
    """

    def __init__(self, p: Problem, plan: Plan, chunk: Chunk, dense: DenseLogits | None) -> None:
        """Look up or make the logits; `dense` are the chunk's stored ones, if any."""
        self.p, self.plan, self.chunk = p, plan, chunk
        self.entries = chunk.local_entries
        self.column = self.entries.token - p.start
        empty = torch.zeros(0, dtype=p.dtype, device=p.head.device)
        self.z_final, self.z_layers, self.teacher = empty, empty.view(0, 0), empty
        self.dense_final = empty if dense is None else dense.final.view(-1)
        from_final = p.options.negatives_from == "final"
        candidates_alone = plan.softmax.is_dense and not plan.distill.is_lists
        self.needs_final = not candidates_alone or (
            plan.negatives.is_lists and (from_final or dense is None)
        )
        needs_layers = plan.distill.is_lists or (plan.negatives.is_lists and not from_final)
        makes_final, makes_layers = self.needs_final, needs_layers
        if dense is not None:
            if self.needs_final:
                index = self._flat_index(plan.final.columns)
                if index is not None:
                    self.z_final, makes_final = dense.final.reshape(-1).take(index), False
            if needs_layers and plan.layer_streams:
                index = self._flat_index(plan.layers.columns)
                if index is not None:
                    layers = [z.reshape(-1).take(index) for z in dense.layers]
                    self.z_layers, makes_layers = torch.stack(layers), False
        if makes_final or makes_layers:
            streams = slice(0 if makes_final else 1, plan.streams if makes_layers else 1)
            z = self.gemm.logits(chunk.x[streams], p.head, p.dtype)
            if makes_final:
                self.z_final, z = z[0], z[1:]
            if makes_layers:
                self.z_layers = z

    def statistics(self, chunk: Chunk) -> None:
        if self.plan.negatives.is_lists:
            self._propose(chunk)
        if self.plan.distill.is_lists:
            self._distill_statistics(chunk)
        if self.plan.softmax.is_lists:
            self._softmax_statistics(chunk)

    def backward(
        self, chunk: Chunk, factors: Factors, gradients: ChunkGradients
    ) -> list[HeadProduct]:
        parts: list[Tensor] = []
        if self.plan.softmax.is_lists:
            parts.append(self._final_gradient(chunk, factors))
        if self.plan.distill.is_lists and factors.distill is not None:
            parts += self._layer_gradients(factors.distill).unbind(0)
        if parts:
            first = 0 if self.plan.softmax.is_lists else 1
            streams = slice(first, first + len(parts))
            self.gemm.backward(
                parts, chunk.x[streams], self.p.head, gradients.hidden[streams], gradients.head
            )
        return []

    @cached_property
    def gemm(self) -> RaggedGemm:
        """The products at the entries. Grouping the rows asks the device, so only on
        use.
        """
        streams, _, d = self.chunk.x.shape
        single = self.entries.single
        return RaggedGemm(self.entries.row, self.column, single, streams, d, self.plan.budget)

    def _flat_index(self, columns: VocabColumns) -> Tensor | None:
        """Return where the entries lie in a flat matrix [n, c] over the columns.

        None: the columns lack some entry. The
        device is asked only where there is doubt.
        """
        position, mask = columns.find(self.column)
        if len(columns) < self.p.stop - self.p.start and not bool(mask.all()):
            return None
        return self.entries.row * len(columns) + position

    def _propose(self, chunk: Chunk) -> None:
        from_final = self.p.options.negatives_from == "final"
        ensemble = self.z_final if from_final else ensemble_mean(self.z_layers)
        entry, row, selection = propose_listed(self.p, self.plan, chunk, ensemble)
        token = self.entries.token.take(entry)
        index, final = entry, self.plan.final.columns
        if self.plan.softmax.is_dense:
            index = row * len(final) + final.find(token - self.p.start)[0]
        z = self.z_final.take(entry) if self.needs_final else self.dense_final.take(index)
        chunk.candidates = Candidates(row, token, ensemble.take(entry), z, index, entry, selection)

    def _distill_statistics(self, chunk: Chunk) -> None:
        """Compute the statistics of METHOD.md §4; the layers' logits become
        exponentials.
        """
        row, stats, n = self.entries.row, chunk.stats, chunk.n
        # A target that its own list lacks is no part of the distill scope.
        outside = self.entries.source < 0
        z = self.z_final.masked_fill(outside, -torch.inf)
        stats.teacher_max = segment_max(z, row, n)
        self.teacher = z.sub_(finite(stats.teacher_max).take(row)).exp_()
        stats.teacher_sum = segment_sum(self.teacher, row, n)
        for i, student in enumerate(self.z_layers):
            stats.cross[i] = segment_sum(self.teacher * (self.z_final - student), row, n)
            student.masked_fill_(outside, -torch.inf)
            stats.layer_max[i] = segment_max(student, row, n)
            student.sub_(finite(stats.layer_max[i]).take(row)).exp_()
            stats.layer_sum[i] = segment_sum(student, row, n)

    def _softmax_statistics(self, chunk: Chunk) -> None:
        """Compute the masked softmax's statistics; the final logits become
        exponentials.
        """
        row, stats = self.entries.row, chunk.stats
        stats.z_target[self.entries.target_row] = self.z_final.take(self.entries.target)
        index = chunk.candidates.logit_index
        self.z_final = self.z_final.index_fill(0, index[index >= 0], -torch.inf)
        stats.row_max = segment_max(self.z_final, row, chunk.n)
        self.z_final.sub_(finite(stats.row_max).take(row)).exp_()
        stats.sum_exp = segment_sum(self.z_final, row, chunk.n)

    def _final_gradient(self, chunk: Chunk, factors: Factors) -> Tensor:
        """Turn the final layer's exponentials [P] into gradients."""
        g, index = self.z_final.mul_(factors.final.take(self.entries.row)), chunk.candidates
        inside = (index.logit_index >= 0).nonzero().flatten()
        g.index_copy_(0, index.logit_index.take(inside), factors.candidates.take(inside))
        # The targets are distinct entries, so no order matters.
        at_target = factors.target.take(self.entries.target_row)
        return g.index_add_(0, self.entries.target, at_target)

    def _layer_gradients(self, factors: DistillFactors) -> Tensor:
        """Turn the layers' exponentials [m, P] into gradients, the
        difference in fp32.
        """
        row = self.entries.row
        teacher = self.teacher.mul_(factors.teacher.take(row))
        for student, factor in zip(self.z_layers, factors.layer, strict=True):
            torch.addcmul(teacher, student, factor.take(row), out=student)
        return self.z_layers
