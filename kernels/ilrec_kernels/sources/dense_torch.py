"""Dense logits of a chunk, stored and passed over by torch: the `torch` backend.

It works on any device. Passes go a tile at a time, so that a tile is read from memory
once for several of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ilrec_kernels.chunk import Chunk, ChunkGradients, DistillFactors, Factors
from ilrec_kernels.layout.segments import exp_below
from ilrec_kernels.layout.vocab_columns import select_columns
from ilrec_kernels.plan import Plan
from ilrec_kernels.problem import Problem
from ilrec_kernels.steps.head_product import HeadProduct, multiply_with_head
from ilrec_kernels.steps.logits import DenseLogits
from ilrec_kernels.steps.negatives import propose_dense
from ilrec_kernels.steps.softmax_stats import exponentiate, row_maxima


class DenseTorch:
    """The dense scopes of one chunk.

    z                     logits, then exponentials without the candidates, then
                          gradients
    teacher               [n, c] e^(z^L − teacher_max) over the distill columns, unless
                          z.final serves as that
    teacher_at_candidates [E] the same at the candidates, where z.final has 0
    """

    def __init__(self, p: Problem, plan: Plan, z: DenseLogits) -> None:
        self.p, self.plan, self.z = p, plan, z
        self.teacher = self.teacher_at_candidates = z.final.new_zeros(0)

    def statistics(self, chunk: Chunk) -> None:
        if self.plan.negatives.is_dense:
            chunk.candidates = propose_dense(self.p, self.plan, chunk, self.z)
        if self.plan.final_is_teacher:
            self._shared_statistics(chunk)
            return
        if self.plan.distill.is_dense:
            self._distill_statistics(chunk)
        if self.plan.softmax.is_dense:
            self._softmax_statistics(chunk)

    def backward(
        self, chunk: Chunk, factors: Factors, gradients: ChunkGradients
    ) -> list[HeadProduct]:
        students = self.z.layers[:0]
        if self.plan.distill.is_dense and factors.distill is not None:
            if self.plan.final_is_teacher:
                students = self._shared_layer_gradients(chunk, factors.distill)
            else:
                students = self._layer_gradients(factors.distill)
        if self.plan.softmax.is_dense:
            self._final_gradient(chunk, factors)
        return multiply_with_head(self.p, self.plan, chunk, self.z, students, gradients.hidden)

    def _softmax_statistics(self, chunk: Chunk) -> None:
        z, stats = self.z.final, chunk.stats
        stats.z_target = self.z.final_targets(chunk)
        z.view(-1).index_fill_(0, chunk.candidates.logit_index, -torch.inf)
        for rows in self.plan.tiles(*z.shape):
            stats.row_max[rows], stats.sum_exp[rows] = exponentiate(z[rows])

    def _distill_statistics(self, chunk: Chunk) -> None:
        """Compute the statistics of METHOD.md §4; the layers' logits become
        exponentials.
        """
        stats, columns = chunk.stats, self.plan.distill.columns
        students, within = self._students(), columns.within(self.plan.final.columns)
        memory = chunk.scratch.teacher[: chunk.n * len(columns)]
        self.teacher = memory.view(chunk.n, len(columns))
        for rows in self.plan.tiles(*self.teacher.shape):
            z, teacher = select_columns(self.z.final[rows], within), self.teacher[rows]
            stats.teacher_max[rows] = row_max = row_maxima(z)
            stats.teacher_sum[rows] = exp_below(z, row_max, out=teacher).sum(1)
            self._student_statistics(chunk, rows, z, teacher, students[:, rows])

    def _shared_statistics(self, chunk: Chunk) -> None:
        """Compute both terms' statistics from one set of the final layer's
        exponentials.

        They become 0 at the candidates once the teacher has been read. Their maximum is
        over all columns: what e^(z − max) then loses is below 10⁻³⁸ of a candidate.
        """
        z, stats, columns = self.z.final, chunk.stats, self.z.final.shape[1]
        stats.z_target = self.z.final_targets(chunk)
        self.teacher_at_candidates = torch.empty_like(chunk.candidates.z)
        for rows, candidates, index in self._candidates_by_tile(chunk):
            tile, teacher = z[rows], chunk.scratch.tile(rows, columns)
            row_max = row_maxima(tile)
            stats.row_max[rows] = stats.teacher_max[rows] = row_max
            stats.teacher_sum[rows] = exp_below(tile, row_max, out=teacher).sum(1)
            self._student_statistics(chunk, rows, tile, teacher, self.z.layers[:, rows])
            flat = teacher.view(-1)
            self.teacher_at_candidates[candidates] = flat.take(index)
            flat.index_fill_(0, index, 0.0)
            stats.sum_exp[rows] = teacher.sum(1)
            tile.copy_(teacher)

    def _student_statistics(
        self, chunk: Chunk, rows: slice, z: Tensor, teacher: Tensor, students: Tensor
    ) -> None:
        """Write the layers' statistics of a tile, given the final layer's logits there.

        `cross` is a sum of differences, not the difference of two large sums.
        """
        stats = chunk.stats
        for i, student in enumerate(students.unbind(0)):
            stats.cross[i, rows] = torch.sub(z, student).mul_(teacher).sum(1)
            stats.layer_max[i, rows], stats.layer_sum[i, rows] = exponentiate(student)

    def _candidates_by_tile(self, chunk: Chunk) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (rows, which candidates lie in them, their flat index in the tile)."""
        columns, candidates = self.z.final.shape[1], chunk.candidates
        tiles = list(self.plan.tiles(*self.z.final.shape))
        bounds = [rows.start for rows in tiles] + [chunk.n]
        edges = torch.searchsorted(
            candidates.row, torch.tensor(bounds, device=chunk.row.device)
        ).tolist()
        for rows, low, high in zip(tiles, edges[:-1], edges[1:], strict=True):
            index = candidates.logit_index[low:high] - rows.start * columns
            yield rows, slice(low, high), index

    def _students(self) -> Tensor:
        """Return the layers' logits [m, n, c] over the distill columns.

        It is a view, or, where the columns are scattered,
        they are moved together (once) in their own memory.
        """
        layers, columns = self.z.layers, self.plan.distill.columns
        within = columns.within(self.plan.layers.columns)
        if isinstance(within, slice):
            return layers[..., within]
        if layers.shape[-1] != len(columns):
            m, n, _ = layers.shape
            stacked = layers.flatten(0, 1)
            compact = layers.view(-1)[: m * n * len(columns)].view(m * n, len(columns))
            # A row moves to where only rows up to itself were.
            for rows in self.plan.tiles(*stacked.shape):
                compact[rows] = stacked[rows].index_select(1, within)
            self.z.layers = compact.view(m, n, len(columns))
        return self.z.layers

    def _final_gradient(self, chunk: Chunk, factors: Factors) -> None:
        """Turn the final layer's exponentials into gradients."""
        g = self.z.final
        g.mul_(factors.final[:, None])
        g.view(-1).index_copy_(0, chunk.candidates.logit_index, factors.candidates)
        owned = chunk.owned.nonzero().flatten()
        index = owned * g.shape[1] + chunk.y[owned]
        g.view(-1).index_add_(0, index, factors.target[owned])

    def _layer_gradients(self, factors: DistillFactors) -> Tensor:
        """Turn the layers' exponentials into gradients [m, n, c], the difference in
        fp32.
        """
        students = self._students()
        for rows in self.plan.tiles(*self.teacher.shape):
            teacher = self.teacher[rows].mul_(factors.teacher[rows, None])
            _subtract_teacher(students[:, rows], teacher, factors.layer[:, rows])
        return students

    def _shared_layer_gradients(self, chunk: Chunk, factors: DistillFactors) -> Tensor:
        """Do the same where the final layer's exponentials are the teacher's.

        They lack the candidates, whose values are kept beside them.
        """
        z, columns = self.z.final, self.z.final.shape[1]
        for rows, candidates, index in self._candidates_by_tile(chunk):
            tile = chunk.scratch.tile(rows, columns)
            teacher = torch.mul(z[rows], factors.teacher[rows, None], out=tile)
            at_candidates = factors.teacher.take(chunk.candidates.row[candidates])
            at_candidates = self.teacher_at_candidates[candidates] * at_candidates
            teacher.view(-1).index_copy_(0, index, at_candidates)
            _subtract_teacher(self.z.layers[:, rows], teacher, factors.layer[:, rows])
        return self.z.layers


def _subtract_teacher(students: Tensor, teacher: Tensor, factors: Tensor) -> None:
    """Compute students [m, r, c] · factors [m, r] + teacher [r, c], which
    is negative.
    """
    for student, factor in zip(students, factors[..., None], strict=True):
        torch.addcmul(teacher, student, factor, out=student)
