"""A rank's candidates for the negatives of a chunk's rows (METHOD.md §2).

They are found by a threshold on z̄ before the normalisers, which leave them out. Among
several ranks the threshold is loosened, and the exact selection follows in tp_merge.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels.chunk import Chunk
from ilrec_kernels.layout.segments import row_counts
from ilrec_kernels.layout.vocab_columns import VocabColumns, select_columns
from ilrec_kernels.plan import CANDIDATE_TILES, Plan
from ilrec_kernels.problem import DenseSource, Problem
from ilrec_kernels.steps.logits import DenseLogits
from ilrec_kernels.steps.topk import dense_candidates, draw_entries, keep_largest
from ilrec_kernels.steps.tp_exchange import Candidates, Selection
from ilrec_kernels.triton.candidate_buffer import CandidateBuffer, CandidateFilter


def needs_ensemble_bound(p: Problem, plan: Plan) -> bool:
    """Whether candidates are looked for before this rank knows z̄(y) exactly.

    That is so where another rank may own y, and in regime V, which makes z̄(y) last.
    """
    from_slices = plan.kernel_finds_negatives and plan.source is DenseSource.SLICES
    return p.options.needs_negatives and (p.group is not None or from_slices)


def target_ensemble(p: Problem, plan: Plan) -> Tensor:
    """Return z̄(y) [N] on every rank, for the pre-filter only.

    With a group this is one small all-reduce a call.
    """
    sources = p.hidden[:1] if p.options.negatives_from == "final" else p.hidden[1:]
    y = p.targets - p.start
    owned = (y >= 0) & (y < p.stop - p.start)
    ensemble = torch.zeros(p.n, dtype=p.dtype, device=p.targets.device)
    rows_per_chunk = max(1, plan.budget // (16 * p.head.shape[1]))
    for rows in torch.split(owned.nonzero().flatten(), rows_per_chunk):
        w = p.head[y[rows]].to(p.dtype)
        total = torch.zeros(len(rows), dtype=p.dtype, device=w.device)
        for hidden in sources:
            total += torch.linalg.vecdot(hidden[rows].to(p.dtype), w)
        ensemble[rows] = total / len(sources)
    if p.group is not None:
        dist.all_reduce(ensemble, group=p.group)
    return ensemble


def ensemble_mean(layers: Tensor) -> Tensor:
    """Return z̄ of [m, P], added in the order L−1 … L−m.

    The kernel multiplies by 1 / m as well: a division would differ in the last bit, and
    with it ties.
    """
    mean = layers[0].clone()
    for layer in layers[1:]:
        mean += layer
    return mean.mul_(1 / layers.shape[0])


def tile_mean(layers: Tensor, columns: slice | Tensor, out: Tensor) -> None:
    """Write z̄ of [m, r, c] at some columns, added in the order L−1 … L−m."""
    out.copy_(select_columns(layers[0], columns))
    for layer in layers[1:]:
        out += select_columns(layer, columns)
    if layers.shape[0] > 1:
        out *= 1 / layers.shape[0]


def _base_threshold(p: Problem, chunk: Chunk) -> Tensor:
    """Return z̄(y) + log φ [n], loosened where z̄(y) is from another product.

    A GPU may have rounded that product's factors to bf16 or TF32.
    """
    bound = chunk.ensemble_bound
    if bound is None:
        bound = chunk.stats.ensemble_target
    else:
        bound = bound - 2e-2 * bound.abs().clamp_(min=1.0)
    return bound + math.log(p.options.negative_threshold)


def dense_threshold(p: Problem, chunk: Chunk) -> Tensor:
    """Return what z̄ must reach in a dense scope [n]; +inf where y is no candidate."""
    y, items = p.targets[chunk.begin : chunk.end], p.options.item_tokens
    if p.options.negative_scope == "all" or items is None:
        in_scope = torch.ones_like(y, dtype=torch.bool)
    elif isinstance(items, Tensor):
        in_scope = torch.isin(y, items)
    else:
        in_scope = (y >= items[0]) & (y < items[1])
    return _base_threshold(p, chunk).masked_fill(~in_scope, torch.inf)


def ensemble_streams(p: Problem, plan: Plan, z: DenseLogits) -> tuple[Tensor, VocabColumns]:
    """Return the logits [m, n, c] whose mean is z̄, and the columns that they cover."""
    if p.options.negatives_from == "final":
        return z.final[None], plan.final.columns
    return z.layers, plan.layers.columns


def target_in_scope(plan: Plan, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Return (position of y within the dense scope, whether this rank has it there)."""
    position, mask = plan.negatives.columns.find(chunk.y)
    return position, mask & chunk.owned


def set_ensemble_target(p: Problem, plan: Plan, chunk: Chunk, z: DenseLogits) -> None:
    """Read z̄(y) from dense logits, on y's owner."""
    streams, columns = ensemble_streams(p, plan, z)
    position, mask = target_in_scope(plan, chunk)
    if not len(plan.negatives):
        return
    within = plan.negatives.columns.within(columns)
    index = position + within.start if isinstance(within, slice) else within[position]
    at_target = ensemble_mean(streams[:, chunk.row, index])
    chunk.stats.ensemble_target = at_target.masked_fill_(~mask, 0.0)


def propose_dense(p: Problem, plan: Plan, chunk: Chunk, z: DenseLogits) -> Candidates:
    """Find candidates among dense logits, of
    which z̄ exists for a few tiles at a time.
    """
    set_ensemble_target(p, plan, chunk, z)
    streams, outer = ensemble_streams(p, plan, z)
    columns = plan.negatives.columns
    within, threshold = columns.within(outer), dense_threshold(p, chunk)
    position, mask = target_in_scope(plan, chunk)
    position.masked_fill_(~mask, -1)
    parts = [(chunk.row[:0], chunk.row[:0], threshold[:0])]
    for rows in plan.tiles(chunk.n, len(columns), CANDIDATE_TILES):
        ensemble, y = chunk.scratch.tile(rows, len(columns)), position[rows]
        tile_mean(streams[:, rows], within, ensemble)
        # y is excluded before the top-k.
        here = (y >= 0).nonzero().flatten()
        ensemble[here, y[here]] = -torch.inf
        row, column, value = dense_candidates(
            ensemble, threshold[rows], p.options.max_negatives + 1, plan.budget
        )
        parts.append((row + rows.start, column, value))
    row, column, value = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    local = columns.at(column)
    matrix_index = row * len(plan.final) + plan.final.columns.find(local)[0]
    return Candidates(
        row,
        local + p.start,
        value,
        z.final.view(-1).take(matrix_index),
        logit_index(p, plan, chunk, row, local),
    )


def logit_index(p: Problem, plan: Plan, chunk: Chunk, row: Tensor, local: Tensor) -> Tensor:
    """Return where the final layer's logits at local columns lie, as in Candidates."""
    if plan.softmax.is_dense:
        return row * len(plan.final) + plan.final.columns.find(local)[0]
    return chunk.local_entries.find(row, local + p.start)


def propose_listed(
    p: Problem, plan: Plan, chunk: Chunk, ensemble: Tensor
) -> tuple[Tensor, Tensor, Selection | None]:
    """Find candidates among the rows' lists, given z̄ [P] of this rank's entries.

    Returns (the candidates' entries [E], their rows [E], the selection).
    On one rank the candidates are H itself; among several the threshold
    was loosened, and one more than k tells whether the row was capped.
    """
    local = chunk.local_entries
    chunk.stats.ensemble_target[local.target_row] = ensemble.take(local.target)
    threshold = _base_threshold(p, chunk).masked_fill_(~local.has_target, torch.inf)
    passed = ensemble >= threshold.take(local.row)
    passed[local.target] = False
    entry = passed.nonzero().flatten()
    row, alone = local.row.take(entry), p.group is None
    k = p.options.max_negatives + (not alone)
    keep, capped = keep_largest(row, ensemble.take(entry), chunk.n, k, plan.budget)
    if keep is not None:
        entry, row = entry.take(keep), row.take(keep)
    if p.options.negatives_from == "random":
        is_other = local.has_target.take(local.row)
        is_other[local.target] = False
        entry = draw_entries(local.row, is_other, row_counts(row, chunk.n))
        row = local.row.take(entry)
    return entry, row, Selection(None, capped) if alone else None


def candidate_filter(p: Problem, plan: Plan, chunk: Chunk) -> CandidateFilter:
    """Return what the row kernels are to collect,
    in columns of the final layer's logits.

    Where z̄(y) is exact this is H itself; otherwise the threshold was loosened, and one
    more than k tells whether the row was capped.
    """
    threshold, columns = dense_threshold(p, chunk), plan.negatives.columns
    first = columns.start - plan.final.columns.start
    position, mask = target_in_scope(plan, chunk)
    return CandidateFilter(
        threshold,
        torch.full_like(threshold, -torch.inf),
        (position + first).masked_fill_(~mask, -1),
        first,
        first + len(columns),
        p.options.max_negatives + (chunk.ensemble_bound is not None),
        p.options.negatives_from == "final",
    )


def buffered_candidates(
    p: Problem, plan: Plan, chunk: Chunk, buffer: CandidateBuffer
) -> tuple[Candidates, Tensor | None]:
    """Return what a kernel collected as candidates, and where each lies in the buffer.

    On one rank with a dense softmax all places of the buffer are candidates,
    and the index is None: the device is not asked how many there are.
    """
    n, k = buffer.columns.shape
    first = plan.final.columns.start
    row = chunk.row[:, None].expand(n, k).flatten()
    column = buffer.columns.flatten().long() + first
    ensemble, is_candidate = buffer.ensemble.flatten(), buffer.columns.flatten() >= 0
    capped = buffer.passed > k if p.options.max_negatives == k else None
    if p.group is None and plan.softmax.is_dense:
        index = row * len(plan.final) + column - first
        selection = None if capped is None else Selection(is_candidate, capped)
        return (
            Candidates(
                row, column + p.start, ensemble, buffer.z.flatten(), index, selection=selection
            ),
            None,
        )
    taken = is_candidate.nonzero().flatten()
    row, column, ensemble, z = (v.take(taken) for v in (row, column, ensemble, buffer.z))
    index = logit_index(p, plan, chunk, row, column)
    selection = None if capped is None else Selection(None, capped)
    return Candidates(row, column + p.start, ensemble, z, index, selection=selection), taken
