"""A rank's candidates for the negatives of a chunk's rows (METHOD.md §2), before the exact selection over all ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels.columns import select
from ilrec_kernels.exchange import RankStats, Sent
from ilrec_kernels.listed import Gate, Listed
from ilrec_kernels.problem import TILES, Plan, Problem
from ilrec_kernels.select import dense_candidates, keep_largest
from ilrec_kernels.state import Chunk


def target_ensemble(p: Problem, plan: Plan) -> Tensor:
    """[N] z̄(y) on every rank, for the pre-filter only: with other ranks one small all-reduce a call."""
    sources = p.hidden[:1] if p.options.negatives_from == "final" else p.hidden[1:]
    y = p.targets - p.start
    owned = (y >= 0) & (y < p.stop - p.start)
    mine = owned.nonzero().flatten()
    out = torch.zeros(p.n, dtype=p.dtype, device=p.targets.device)
    for part in mine.split(max(1, plan.budget // (16 * p.head.shape[1]))):
        w = p.head[y[part]].to(p.dtype)
        out[part] = sum(torch.linalg.vecdot(h[part].to(p.dtype), w) for h in sources) / len(sources)  # type: ignore[assignment]
    if p.group is not None:
        dist.all_reduce(out, group=p.group)
    return out


def find_candidates(p: Problem, plan: Plan, chunk: Chunk, early: Tensor | None) -> None:
    """Local candidates that may be in H, and the owner's z̄(y). Gated ones are found by the pass over the statistics, here only what it needs."""
    if plan.ragged_negatives:
        listed_candidates(p, plan, chunk, early)
        return
    final, stats, columns = p.options.negatives_from == "final", chunk.stats, plan.negatives
    assert columns is not None and plan.final is not None and stats is not None
    position, inside = columns.find(chunk.y)
    here = inside & chunk.owned
    outer = plan.final if final else plan.layers
    source = chunk.z_final[None] if final and chunk.z_final is not None else chunk.z_layers
    assert outer is not None
    within = columns.within(outer)
    if len(columns) and source is not None:  # regime V has no logits yet
        place = position + within.start if isinstance(within, slice) else within[position]
        stats.ensemble_target = mean(source[:, chunk.row, place]).masked_fill_(~here, 0.0)
    bar = candidate_bar(p, chunk, stats, early)
    if plan.gated:
        first, alone = columns.start - plan.final.start, early is None
        target = (position + first).masked_fill_(~here, -1)
        # alone, the bar is exact and this is H itself; else it was loosened, and one more tells whether the row was capped
        k = p.options.max_negatives + (not alone)
        chunk.gate = Gate(
            bar, torch.full_like(bar, -torch.inf), target, first, first + len(columns), k, final
        )
        return
    assert source is not None
    row, column, ensemble = tiled_candidates(
        plan,
        chunk,
        source,
        within,
        bar,
        position.masked_fill(~here, -1),
        p.options.max_negatives + 1,
    )
    chunk.sent = dense_sent(p, plan, chunk, row, columns.local(column), ensemble)


def send_listed(p: Problem, plan: Plan, chunk: Chunk, listed: Listed) -> None:
    """What the gate let through: as lists of one length where nobody else is told and the softmax is dense, so that the device need not be asked."""
    assert plan.final is not None and chunk.gate is not None
    chunk.listed = listed
    n, k = listed.columns.shape
    row, column = (
        chunk.row[:, None].expand(n, k).flatten(),
        listed.columns.flatten().long() + plan.final.start,
    )
    ensemble, taken = listed.ensemble.flatten(), listed.columns.flatten() >= 0
    exact = p.options.max_negatives == k
    over = listed.found > k if exact else None
    if p.group is None and plan.softmax:
        slot = row * len(plan.final) + column - plan.final.start
        chunk.sent = Sent(
            row, column + p.start, ensemble, listed.z.flatten(), slot, over=over, member=taken
        )
        return
    chunk.place = taken.nonzero().flatten()
    row, column, ensemble, z = (
        values.take(chunk.place) for values in (row, column, ensemble, listed.z)
    )
    chunk.sent = Sent(
        row, column + p.start, ensemble, z, slot_of(p, plan, chunk, row, column), over=over
    )


def listed_candidates(p: Problem, plan: Plan, chunk: Chunk, early: Tensor | None) -> None:
    """Among the rows' lists."""
    local, stats = chunk.local, chunk.stats
    assert local is not None and stats is not None
    value = chunk.p_final if p.options.negatives_from == "final" else mean(chunk.p_layers)
    assert value is not None
    stats.ensemble_target[local.target_row] = value.take(local.target)
    bar = stats.ensemble_target if early is None else loosened(early)
    bar = (bar + math.log(p.options.negative_threshold)).masked_fill_(~local.has_target, torch.inf)
    reached = value >= bar.take(local.row)
    reached[local.target] = False
    entry = reached.nonzero().flatten()
    row, alone = local.row.take(entry), p.group is None
    # alone, this is H itself; among ranks the bar was loosened, and one more tells whether the row was capped
    keep, over = keep_largest(
        row, value.take(entry), chunk.n, p.options.max_negatives + (not alone), plan.budget
    )
    if keep is not None:
        entry, row = entry.take(keep), row.take(keep)
    token = local.token.take(entry)
    slot, z = entry, chunk.p_final
    if plan.softmax:
        assert plan.final is not None
        slot = row * len(plan.final) + plan.final.find(token - p.start)[0]
    z = z.take(entry) if z is not None else chunk.z_final.view(-1).take(slot)  # type: ignore[union-attr]
    chunk.sent = Sent(row, token, value.take(entry), z, slot, entry, over if alone else None)


def tiled_candidates(
    plan: Plan,
    chunk: Chunk,
    source: Tensor,
    within: slice | Tensor,
    bar: Tensor,
    position: Tensor,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As select.dense_candidates of z̄ [n, c] without the target's column `position` [n] (−1: not here), of which only a few tiles are there at a time."""
    parts, columns = (
        [(chunk.row[:0], chunk.row[:0], bar[:0])],
        len(plan.negatives) if plan.negatives is not None else 0,
    )
    for rows in plan.tiles(chunk.n, columns, TILES):
        value, y = chunk.desk(rows, columns), position[rows]
        average(source[:, rows], within, value)
        here = (y >= 0).nonzero().flatten()
        value[here, y[here]] = -torch.inf  # y is excluded before the top-k
        row, column, ensemble = dense_candidates(value, bar[rows], k, plan.budget)
        parts.append((row + rows.start, column, ensemble))
    row, column, ensemble = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return row, column, ensemble


def average(layers: Tensor, within: slice | Tensor, out: Tensor) -> None:
    """z̄ of [m, r, c] at the columns `within`, added in the order L−1 … L−m."""
    out.copy_(select(layers[0], within))
    for layer in layers[1:]:
        out += select(layer, within)
    if layers.shape[0] > 1:
        out *= 1 / layers.shape[0]


def candidate_bar(p: Problem, chunk: Chunk, stats: RankStats, early: Tensor | None) -> Tensor:
    """[n] what z̄ must reach in the dense scope; +inf where y is no candidate."""
    bar = stats.ensemble_target if early is None else loosened(early)
    return (bar + math.log(p.options.negative_threshold)).masked_fill(
        ~target_is_item(p, chunk), torch.inf
    )


def dense_sent(
    p: Problem, plan: Plan, chunk: Chunk, row: Tensor, column: Tensor, ensemble: Tensor
) -> Sent:
    """The entries at local columns, with their final logits and where those sit."""
    assert plan.final is not None and chunk.z_final is not None
    z = chunk.z_final.view(-1).take(row * len(plan.final) + plan.final.find(column)[0])
    return Sent(row, column + p.start, ensemble, z, slot_of(p, plan, chunk, row, column))


def slot_of(p: Problem, plan: Plan, chunk: Chunk, row: Tensor, column: Tensor) -> Tensor:
    """Where the final layer's logit at a local column sits, as in Sent."""
    assert plan.final is not None
    if plan.softmax:
        return row * len(plan.final) + plan.final.find(column)[0]
    assert chunk.local is not None
    return chunk.local.find(row, column + p.start)


def mean(layers: Tensor | None) -> Tensor:
    """z̄ of [m, P], added in the order L−1 … L−m."""
    assert layers is not None
    out = layers[0].clone()
    for layer in layers[1:]:
        out += layer
    return out.mul_(
        1 / layers.shape[0]
    )  # as the kernel does: a division would differ in the last bit, and with it ties


def loosened(early: Tensor) -> Tensor:
    """A bar a little under z̄(y) + log φ: the value comes from another product than the candidates', whose factors a GPU may have rounded to bf16 or TF32."""
    return early - 2e-2 * early.abs().clamp_(min=1.0)


def target_is_item(p: Problem, chunk: Chunk) -> Tensor:
    """bool [n]: the target is in the dense negative scope (of the whole vocabulary)."""
    y, items = p.targets[chunk.begin : chunk.end], p.options.item_tokens
    if p.options.negative_scope == "all" or items is None:
        return torch.ones_like(y, dtype=torch.bool)
    return torch.isin(y, items) if isinstance(items, Tensor) else (y >= items[0]) & (y < items[1])
