"""Regime V of the `triton` backend: a chunk's logits are made a slice of the vocabulary at a time, once for the statistics and once for the gradients.

It serves a vocabulary so large, or a workspace so small, that regime T's chunks would be a few hundred rows: there the products would be bound
by reading the head again for every chunk. Here thousands of rows meet a slice of the head at once, and as often is a slice of its gradient written:
once where a chunk has room for all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels import fused
from ilrec_kernels.columns import Columns
from ilrec_kernels.linear import hidden_gradient, project, weight_gradient
from ilrec_kernels.listed import Gate, Listed
from ilrec_kernels.negatives import mean
from ilrec_kernels.problem import Plan, Problem
from ilrec_kernels.segments import finite
from ilrec_kernels.state import Chunk, Factors, Gradients


@dataclass(frozen=True)
class Slice:
    """Some columns of a chunk's logits. Outside the distill scope the final layer's alone."""

    columns: Columns
    x: Tensor  # [streams · n, d]
    z: Tensor  # [streams, n, w]
    target: Tensor  # int64 [n] the target's column in the slice, −1 where it is in another
    distill: tuple[int, int]  # the distill scope's columns in the slice
    entries: Tensor  # int64: which of the chunk's sent entries lie here
    row: Tensor  # their rows
    column: Tensor  # their columns in the slice


def slices(p: Problem, plan: Plan, chunk: Chunk, gate: Gate | None = None) -> Iterator[Slice]:
    """All of them, ascending, one after the other in the same memory; the layers' logits where they are distilled, or where the gate needs them."""
    assert plan.final is not None
    c, n, width, first = len(plan.final), chunk.n, plan.slice_columns, plan.final.start
    low, high = (
        (0, 0) if plan.distill is None else (plan.distill.start - first, plan.distill.stop - first)
    )
    slot = (
        chunk.sent.slot if not plan.gated else chunk.sent.slot[:0]
    )  # those are told by their lists
    row, column = slot // max(c, 1), slot % max(c, 1)
    order = torch.argsort(column, stable=True)  # so that a slice's entries are a range
    edges = torch.searchsorted(
        column.take(order), torch.arange(0, c + width, width, device=column.device)
    ).tolist()
    memory = torch.empty(plan.streams * n * min(width, c), dtype=p.dtype, device=p.head.device)
    for number, begin in enumerate(range(0, c, width)):
        end = min(c, begin + width)
        distill = (min(max(low, begin), end) - begin, min(max(high, begin), end) - begin)
        gated = gate is not None and not gate.from_final and gate.first < end and gate.last > begin
        streams = plan.streams if distill[1] > distill[0] or gated else 1
        columns, x = Columns(first + begin, first + end), chunk.x[:streams].flatten(0, 1)
        z = memory[: streams * n * (end - begin)].view(streams, n, end - begin)
        project(x, p.head, columns, z.flatten(0, 1), plan.block)
        y = chunk.y - first - begin
        target = y.masked_fill(~chunk.owned | (y < 0) | (y >= end - begin), -1)
        entries = order[edges[number] : edges[number + 1]]
        yield Slice(
            columns, x, z, target, distill, entries, row.take(entries), column.take(entries) - begin
        )


def collect(p: Problem, plan: Plan, chunk: Chunk) -> Listed | None:
    """The statistics of all slices, joined, and the candidates that chunk.gate lets through."""
    stats, gate = chunk.stats, chunk.gate
    assert stats is not None and plan.final is not None
    listed = None if gate is None else Listed.empty(chunk.n, gate.k, chunk.row.device)
    for s in slices(p, plan, chunk, chunk.gate):
        z, begin = s.z[0], s.columns.start - plan.final.start
        mark = None
        if s.entries.numel():
            mark = torch.zeros(z.shape, dtype=torch.int8, device=z.device)
            mark[s.row, s.column] = 1
        layers = s.z[1:] if s.z.shape[0] > 1 else None
        some = None
        if (
            gate is not None
            and listed is not None
            and gate.first < begin + z.shape[1]
            and gate.last > begin
        ):
            some = gate.shifted(begin, begin + z.shape[1], listed.floors())
            source = z[None] if gate.from_final else s.z[1:]
            stats.ensemble_target += mean(
                source[:, chunk.row, some.targets.clamp(min=0)]
            ).masked_fill_(some.targets < 0, 0.0)
        (top, rest, teacher_top, teacher_rest, layer_top, layer_rest, cross), more = (
            fused.slice_statistics(z, layers, mark, s.distill, some)
        )
        stats.z_target += z[chunk.row, s.target.clamp(min=0)].masked_fill_(s.target < 0, 0.0)
        stats.top, stats.rest, _, _ = join(stats.top, stats.rest, top, rest)
        if more is not None and listed is not None:
            listed, gone = listed.joined(more, begin)
            top = gone.amax(1)
            stats.top, stats.rest, _, _ = join(
                stats.top, stats.rest, top, torch.exp(gone - finite(top)[:, None]).sum(1)
            )
        if s.distill[1] > s.distill[0]:
            stats.teacher_top, stats.teacher_rest, before, here = join(
                stats.teacher_top, stats.teacher_rest, teacher_top, teacher_rest
            )
            stats.layer_top, stats.layer_rest, _, _ = join(
                stats.layer_top, stats.layer_rest, layer_top, layer_rest
            )
            stats.cross = before * stats.cross + here * cross
    return listed


def join(
    top: Tensor, rest: Tensor, other_top: Tensor, other_rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(max, sum of exponentials) of two parts together, and what each part's sums are multiplied by."""
    highest = torch.maximum(top, other_top)
    one, two = torch.exp(top - finite(highest)), torch.exp(other_top - finite(highest))
    return highest, one * rest + two * other_rest, one, two


def finish(
    p: Problem, plan: Plan, chunk: Chunk, factors: Factors, grad_x: Tensor, out: Gradients
) -> None:
    """Gradients slice by slice: logits anew, turned into gradients in place, multiplied with the head and with the rows."""
    assert plan.final is not None
    values = None if chunk.listed is None else fused.listed_gradients(chunk, factors)
    tables = {
        streams: fused.factor_table(chunk, factors, streams - 1, True)
        for streams in {1, plan.streams}
    }
    for s in slices(p, plan, chunk):
        streams = s.z.shape[0]
        begin = s.columns.start - plan.final.start
        listed = (
            None
            if chunk.listed is None or values is None
            else (chunk.listed.within(begin, begin + s.z.shape[2]), values)
        )
        g = fused.turn(p, s.z, tables[streams], s.target, s.distill, listed)
        if listed is None:
            g[s.row, s.column] = factors.sent.take(s.entries).to(g.dtype)
        stacked = g.as_strided((streams * chunk.n, g.shape[1]), g.stride())
        hidden_gradient(
            stacked, p.head, s.columns, grad_x[:streams].flatten(0, 1), plan.block, accumulate=True
        )
        if out.head is not None:
            weight_gradient(stacked, s.x, out.head[s.columns.start : s.columns.stop], p.head.dtype)
