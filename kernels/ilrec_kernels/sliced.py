"""Regime V of the `triton` backend: logits are never stored. Forward makes statistics tile by tile; backward recomputes slices of the vocabulary.

It serves a vocabulary so large, or a workspace so small, that regime T's chunks would be a few hundred rows: there the products would be bound
by reading the head again for every chunk. Here thousands of rows meet a slice of the head at once, and as often is a slice of its gradient written:
once where a chunk has room for all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilrec_kernels.columns import Columns
from ilrec_kernels.linear import hidden_gradient, project, weight_gradient
from ilrec_kernels.problem import Plan, Problem
from ilrec_kernels.segments import finite
from ilrec_kernels.state import Chunk, Factors, Gradients


def distill_range(plan: Plan) -> tuple[int, int] | None:
    return None if plan.distill is None else (plan.distill.start, plan.distill.stop)


def collect(p: Problem, plan: Plan, chunk: Chunk) -> None:
    """Statistics of all splits, redone without the sent entries where a split has any, then joined."""
    from ilrec_kernels import sliced_triton as kernels

    assert plan.final is not None and chunk.stats is not None
    stats, columns = chunk.stats, plan.final
    target = chunk.y.masked_fill(~chunk.owned, -1)
    out = kernels.forward(chunk.x, p.head[columns.start : columns.stop], target, distill_range(plan))
    if not out.shape[0]:
        return
    without_sent(p, plan, chunk, out)
    stats.z_target = out[:, kernels.Z_TARGET].sum(0)
    stats.top, stats.rest, _ = join(out[:, kernels.TOP], out[:, kernels.REST])
    if plan.distill is not None:
        stats.teacher_top, stats.teacher_rest, share = join(out[:, kernels.TEACHER_TOP], out[:, kernels.TEACHER_REST])
        layers = out[:, kernels.PER_LAYER :].unflatten(1, (-1, 3))
        stats.layer_top, stats.layer_rest, _ = join(layers[:, :, 0], layers[:, :, 1])
        stats.cross = (share[:, None] * layers[:, :, 2]).sum(0)


def join(top: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(max, sum of exponentials, each part's factor) over the leading dimension."""
    highest = top.amax(0)
    share = torch.exp(top - finite(highest))
    return highest, (rest * share).sum(0), share


def without_sent(p: Problem, plan: Plan, chunk: Chunk, out: Tensor) -> None:
    """Redo (max, sum) of the splits in which a row has sent entries, with those left out: nothing is ever subtracted."""
    from ilrec_kernels import sliced_triton as kernels

    assert plan.final is not None
    slot, c, first = chunk.sent.slot, len(plan.final), plan.final.start
    row, column = slot // c, slot % c
    split = column // kernels.SPLIT
    for s in torch.unique(split).tolist():
        begin, end = s * kernels.SPLIT, min(c, (s + 1) * kernels.SPLIT)
        mine = (split == s).nonzero().flatten()
        mine_row, mine_column = row.take(mine), column.take(mine) - begin
        rows = torch.unique(mine_row)
        step = max(1, plan.budget // (out.element_size() * (end - begin) + chunk.x.element_size() * chunk.x.shape[2]))
        for part in rows.split(step):
            z = out.new_empty(part.numel(), end - begin)
            project(chunk.x[0, part], p.head, Columns(first + begin, first + end), z, plan.block)
            place = torch.searchsorted(part, mine_row).clamp_(max=part.numel() - 1)
            here = (part.take(place) == mine_row).nonzero().flatten()
            z[place.take(here), mine_column.take(here)] = -torch.inf
            top = z.amax(1)
            out[s, kernels.TOP, part] = top
            out[s, kernels.REST, part] = z.sub_(finite(top)[:, None]).exp_().sum(1)


def finish(p: Problem, plan: Plan, chunk: Chunk, factors: Factors, grad_x: Tensor, out: Gradients) -> None:
    """Gradients slice by slice: recompute the logits, turn them into gradients in place, multiply with the head and with the rows."""
    from ilrec_kernels import fused

    assert plan.final is not None
    c, n, width, first = len(plan.final), chunk.n, plan.slice_columns, plan.final.start
    low, high = distill_range(plan) or (0, 0)
    row, column = chunk.sent.slot // max(c, 1), chunk.sent.slot % max(c, 1)
    order = torch.argsort(column, stable=True)  # so that a slice's entries are a range
    edges = torch.searchsorted(column.take(order), torch.arange(0, c + width, width, device=column.device)).tolist()
    tables = {streams: fused.factor_table(chunk, factors, streams - 1, True) for streams in {1, plan.streams}}
    memory = torch.empty(plan.streams * n * min(width, c), dtype=p.dtype, device=p.head.device)
    for number, begin in enumerate(range(0, c, width)):
        end = min(c, begin + width)
        columns = Columns(first + begin, first + end)
        distill = (min(max(low, begin), end) - begin, min(max(high, begin), end) - begin)
        streams = plan.streams if distill[1] > distill[0] else 1
        x = chunk.x[:streams].flatten(0, 1)
        z = memory[: streams * n * (end - begin)].view(streams, n, end - begin)
        project(x, p.head, columns, z.flatten(0, 1), plan.block)
        target = (chunk.y - begin).masked_fill(~chunk.owned | (chunk.y < begin) | (chunk.y >= end), -1)
        g = fused.turn(p, z, tables[streams], target, distill)
        inside = order[edges[number] : edges[number + 1]]
        g[row.take(inside), column.take(inside) - begin] = factors.sent.take(inside).to(g.dtype)
        stacked = g.as_strided((streams * n, end - begin), g.stride())
        hidden_gradient(stacked, p.head, columns, grad_x[:streams].flatten(0, 1), plan.block, accumulate=True)
        if out.head is not None:
            weight_gradient(stacked, x, out.head[columns.start : columns.stop], p.head.dtype)
