"""A chunk's logits: dense over the plan's columns, and at the rows' lists."""

from __future__ import annotations

import torch
from torch import Tensor

from ilrec_kernels.columns import Columns
from ilrec_kernels.exchange import empty_sent
from ilrec_kernels.linear import project
from ilrec_kernels.pairs import chunk_pairs
from ilrec_kernels.problem import Plan, Problem, Span
from ilrec_kernels.ragged import RaggedHead
from ilrec_kernels.state import Chunk, Scratch


def start_chunk(p: Problem, plan: Plan, scratch: Scratch, span: Span, complete: bool) -> Chunk:
    """Logits: dense where the plan has columns, and at the pairs where a list scope is used. `complete` as of pairs.lists_hold_targets."""
    begin, end = span.begin, span.end
    x = torch.stack([h[begin:end].to(p.row_dtype) for h in p.hidden[: plan.streams]])
    y = p.targets[begin:end] - p.start
    owned = (y >= 0) & (y < p.stop - p.start)
    chunk = Chunk(
        begin,
        end,
        x,
        y.masked_fill_(~owned, 0),
        owned,
        torch.arange(end - begin, device=y.device),
        scratch,
        empty_sent(p),
    )
    if not plan.sliced:  # regime V makes logits tile by tile
        dense_logits(p, plan, chunk)
    if plan.pairs:
        assert p.candidates is not None
        chunk.pairs = chunk_pairs(p.candidates, p.targets, span, complete)
        chunk.local = chunk.pairs if p.group is None else chunk.pairs.in_shard(p.start, p.stop)
        at_pairs(p, plan, chunk)
    return chunk


def dense_logits(p: Problem, plan: Plan, chunk: Chunk) -> None:
    """One product for all streams where they cover the same columns."""
    x, n, s = chunk.x, chunk.n, plan.streams
    memory = chunk.scratch.logits
    if plan.final is not None and plan.final.same(plan.layers) and s > 1:
        z = memory[: s * n * len(plan.final)].view(s, n, len(plan.final))
        project(x.flatten(0, 1), p.head, plan.final, z.flatten(0, 1), plan.block)
        chunk.z_final, chunk.z_layers = z[0], z[1:]
        return
    used = 0
    if plan.final is not None:
        used = n * len(plan.final)
        chunk.z_final = memory[:used].view(n, len(plan.final))
        project(x[0], p.head, plan.final, chunk.z_final, plan.block)
    if plan.layers is not None:
        chunk.z_layers = memory[used : used + (s - 1) * n * len(plan.layers)].view(
            s - 1, n, len(plan.layers)
        )
        project(x[1:].flatten(0, 1), p.head, plan.layers, chunk.z_layers.flatten(0, 1), plan.block)


def at_pairs(p: Problem, plan: Plan, chunk: Chunk) -> None:
    """Logits at the pairs, gathered from dense ones where those hold them, else computed for the lists alone."""
    assert chunk.local is not None
    local, column = chunk.local, chunk.local.token - p.start
    from_final = p.options.negatives_from == "final"
    # the final logits of negatives drawn from the layers are looked up for those alone, where there is a matrix to look in
    need_final = (
        not plan.softmax
        or plan.ragged_distill
        or (plan.ragged_negatives and (from_final or chunk.z_final is None))
    )
    need_layers = plan.ragged_distill or (plan.ragged_negatives and not from_final)

    def gather(z: Tensor | None, columns: Columns | None) -> Tensor | None:
        if z is None or columns is None:
            return None
        position, inside = columns.find(column)
        if len(columns) < p.stop - p.start and not bool(
            inside.all()
        ):  # asks the device only where there is a question
            return None
        flat = local.row * z.shape[-1] + position
        return (
            z.reshape(-1).take(flat)
            if z.dim() == 2
            else torch.stack([layer.reshape(-1).take(flat) for layer in z])
        )

    if need_final:
        chunk.p_final = gather(chunk.z_final, plan.final)
    if need_layers:
        chunk.p_layers = gather(chunk.z_layers, plan.layers)
    grads_at_pairs = not plan.softmax or plan.ragged_distill
    missing = (need_final and chunk.p_final is None) or (need_layers and chunk.p_layers is None)
    if not (grads_at_pairs or missing):
        return
    chunk.ragged = RaggedHead(
        local.row, column, local.single, chunk.x.shape[0], chunk.x.shape[2], plan.budget
    )
    if missing:
        first = 0 if need_final and chunk.p_final is None else 1
        last = chunk.x.shape[0] if need_layers and chunk.p_layers is None else 1
        z = chunk.ragged.logits(chunk.x[first:last], p.head, p.dtype)
        if first == 0:
            chunk.p_final, z = z[0], z[1:]
        if last > 1:
            chunk.p_layers = z
