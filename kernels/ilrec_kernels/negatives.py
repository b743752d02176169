"""A rank's candidates for the negatives of a chunk's rows (METHOD.md §2), before the exact selection over all ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels import fused
from ilrec_kernels.columns import select
from ilrec_kernels.merge import RankStats, Sent
from ilrec_kernels.problem import Plan, Problem
from ilrec_kernels.select import dense_candidates, keep_largest
from ilrec_kernels.state import Chunk


def target_ensemble(p: Problem, plan: Plan) -> Tensor:
    """[N] z̄(y) on every rank, for the pre-filter only: one small all-reduce a call."""
    sources = p.hidden[:1] if p.options.negatives_from == "final" else p.hidden[1:]
    y = p.targets - p.start
    owned = (y >= 0) & (y < p.stop - p.start)
    mine = owned.nonzero().flatten()
    out = torch.zeros(p.n, dtype=p.dtype, device=p.targets.device)
    for part in mine.split(max(1, plan.budget // (8 * p.head.shape[1]))):
        w = p.head[y[part]].to(p.dtype)
        out[part] = sum(torch.linalg.vecdot(h[part].to(p.dtype), w) for h in sources) / len(sources)  # type: ignore[assignment]
    dist.all_reduce(out, group=p.group)
    return out


def find_candidates(p: Problem, plan: Plan, chunk: Chunk, early: Tensor | None) -> None:
    """Local candidates that may be in H, and the owner's z̄(y)."""
    assert chunk.stats is not None
    k, log_phi, stats = p.options.max_negatives, math.log(p.options.negative_threshold), chunk.stats
    final = p.options.negatives_from == "final"
    if plan.ragged_negatives:
        local, z = chunk.local, chunk.p_final
        assert local is not None and z is not None and chunk.pairs is not None
        value = z if final else mean(chunk.p_layers)
        stats.ensemble_target[local.row[local.is_target]] = value[local.is_target]
        bar = stats.ensemble_target if early is None else loosened(early)
        bar = (bar + log_phi).masked_fill(~local.has_target, torch.inf)
        entry = ((value >= bar.take(local.row)) & ~local.is_target).nonzero().flatten()
        if p.group is not None:
            entry = entry[keep_largest(local.row[entry], value[entry], chunk.n, k + 1, plan.budget)[0]]
        row, token = local.row.take(entry), local.token.take(entry)
        slot = entry
        if plan.softmax:
            assert plan.final is not None
            slot = row * len(plan.final) + plan.final.find(token - p.start)[0]
        chunk.sent = Sent(row, token, value.take(entry), z.take(entry), slot, entry)
        return
    columns, outer, source = plan.negatives, plan.final if final else plan.layers, chunk.z_final if final else chunk.z_layers
    assert columns is not None and outer is not None and source is not None and plan.final is not None and chunk.z_final is not None
    within = columns.within(outer)
    position, inside = columns.find(chunk.y)
    mine = (inside & chunk.owned).nonzero().flatten()
    if plan.fused and isinstance(within, slice):
        stack = (source[None] if final else source)[..., within]
        stats.ensemble_target[mine] = mean(stack[:, mine, position[mine]])
        bar = candidate_bar(p, chunk, stats, early)
        row, column, ensemble = fused.candidates(stack, bar, position.masked_fill(~(inside & chunk.owned), -1), k + 1)
        chunk.sent = dense_sent(p, plan, chunk, row, columns.local(column), ensemble)
        return
    value = select(source if final else source[0], within)
    borrowed = isinstance(within, slice) and (final or source.shape[0] == 1)
    if not final and source.shape[0] > 1:
        value = value + select(source[1], within)
        for layer in source[2:]:
            value += select(layer, within)
        value /= source.shape[0]
    position = position[mine]
    z_target = value[mine, position]
    stats.ensemble_target[mine] = z_target
    bar = candidate_bar(p, chunk, stats, early)
    value[mine, position] = -torch.inf  # y is excluded before the top-k
    row, column, ensemble = dense_candidates(value, bar, k + 1)
    if borrowed:
        value[mine, position] = z_target
    chunk.sent = dense_sent(p, plan, chunk, row, columns.local(column), ensemble)


def candidate_bar(p: Problem, chunk: Chunk, stats: RankStats, early: Tensor | None) -> Tensor:
    """[n] what z̄ must reach in the dense scope; +inf where y is no candidate."""
    bar = stats.ensemble_target if early is None else loosened(early)
    return (bar + math.log(p.options.negative_threshold)).masked_fill(~target_is_item(p, chunk), torch.inf)


def dense_sent(p: Problem, plan: Plan, chunk: Chunk, row: Tensor, column: Tensor, ensemble: Tensor) -> Sent:
    """The entries at local columns, with their final logits and where those sit."""
    assert plan.final is not None and chunk.z_final is not None
    slot = row * len(plan.final) + plan.final.find(column)[0]
    z, token = chunk.z_final.view(-1).take(slot), column + p.start
    if not plan.softmax:
        assert chunk.local is not None
        slot = chunk.local.find(row, token)
    return Sent(row, token, ensemble, z, slot)


def mean(layers: Tensor | None) -> Tensor:
    """z̄ of [m, P], added in the order L−1 … L−m."""
    assert layers is not None
    out = layers[0].clone()
    for layer in layers[1:]:
        out += layer
    return out.div_(layers.shape[0])


def loosened(early: Tensor) -> Tensor:
    """A bar a little under z̄(y) + log φ: the value comes from another product than the candidates'."""
    return early - 1e-3 * early.abs().clamp_(min=1.0)


def target_is_item(p: Problem, chunk: Chunk) -> Tensor:
    """bool [n]: the target is in the dense negative scope (of the whole vocabulary)."""
    y, items = p.targets[chunk.begin : chunk.end], p.options.item_tokens
    if p.options.negative_scope == "all" or items is None:
        return torch.ones_like(y, dtype=torch.bool)
    return torch.isin(y, items) if isinstance(items, Tensor) else (y >= items[0]) & (y < items[1])
