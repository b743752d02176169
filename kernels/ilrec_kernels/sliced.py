"""Regime V of the `triton` backend: logits are never stored. Forward makes statistics tile by tile; backward recomputes slices of the vocabulary.

It serves a vocabulary so large, or a workspace so small, that regime T's chunks would be a few hundred rows: there the products would be bound
by reading the head again for every chunk. All rows meet a slice of the head at once, and each slice of its gradient is written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    weight, stats = plan.final.weight(p.head), chunk.stats
    target = chunk.y.masked_fill(~chunk.owned, -1)
    out = kernels.forward(chunk.x.to(p.head.dtype), weight, target, distill_range(plan))
    if not out.shape[0]:
        return
    without_sent(plan, chunk, weight, out)
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


def without_sent(plan: Plan, chunk: Chunk, weight: Tensor, out: Tensor) -> None:
    """Redo (max, sum) of the splits in which a row has sent entries, with those left out: nothing is ever subtracted."""
    from ilrec_kernels import sliced_triton as kernels

    slot, c = chunk.sent.slot, weight.shape[0]
    row, column = slot // c, slot % c
    split = column // kernels.SPLIT
    for s in torch.unique(split).tolist():
        begin, end = s * kernels.SPLIT, min(c, (s + 1) * kernels.SPLIT)
        mine = split == s
        rows = torch.unique(row[mine])
        step = max(1, plan.budget // (4 * (end - begin)))
        for part in rows.split(step):
            z = chunk.x.new_empty(part.numel(), end - begin)
            project(chunk.x[0, part], weight[begin:end], z, plan.block)
            place = torch.searchsorted(part, row[mine]).clamp_(max=part.numel() - 1)
            here = part[place] == row[mine]
            z[place[here], column[mine][here] - begin] = -torch.inf
            top = z.amax(1)
            out[s, kernels.TOP, part] = top
            out[s, kernels.REST, part] = z.sub_(finite(top)[:, None]).exp_().sum(1)


def finish(p: Problem, plan: Plan, chunk: Chunk, factors: Factors, grad_x: Tensor, out: Gradients) -> None:
    """Gradients slice by slice: recompute the logits, turn them into gradients in place, multiply with the head and with the rows."""
    from ilrec_kernels import fused

    assert plan.final is not None
    weight, c, n = plan.final.weight(p.head), len(plan.final), chunk.n
    low, high = distill_range(plan) or (0, 0)
    row, column = chunk.sent.slot // max(c, 1), chunk.sent.slot % max(c, 1)
    width = max(128, plan.slice_columns)
    for begin in range(0, c, width):
        end = min(c, begin + width)
        distill = (min(max(low, begin), end) - begin, min(max(high, begin), end) - begin)
        streams = plan.streams if distill[1] > distill[0] else 1
        z = chunk.x.new_empty(streams, n, end - begin)
        project(chunk.x[:streams].flatten(0, 1), weight[begin:end], z.flatten(0, 1), plan.block)
        target = (chunk.y - begin).masked_fill(~chunk.owned | (chunk.y < begin) | (chunk.y >= end), -1)
        g = fused.turn(p, chunk, z, factors, target, distill)
        inside = (column >= begin) & (column < end)
        g[row[inside], column[inside] - begin] = factors.sent[inside].to(g.dtype)
        stacked = g.as_strided((streams * n, end - begin), g.stride())
        hidden_gradient(stacked, weight[begin:end], grad_x[:streams].flatten(0, 1), plan.block, accumulate=True)
        if out.head is not None:
            weight_gradient(stacked, chunk.x[:streams].flatten(0, 1), out.head[plan.final.start + begin : plan.final.start + end], p.head.dtype)
