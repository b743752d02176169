"""How the `triton` backend's row kernels take the place of the torch backend's passes over a chunk's dense logits (regime T)."""

from __future__ import annotations

import torch
from torch import Tensor

from ilrec_kernels.problem import Plan, Problem
from ilrec_kernels.segments import finite
from ilrec_kernels.select import dense_candidates, keep_largest
from ilrec_kernels.state import Chunk, Factors


def gradient_dtype(p: Problem) -> torch.dtype:
    """The head's own dtype: gradients at the logits are rounded to it once, when the kernel stores them."""
    return p.head.dtype


def layout(plan: Plan) -> tuple[tuple[int, int], int]:
    """((first, last) distill column of the final layer's matrix, by how much the layers' columns are shifted against it)."""
    if plan.distill is None or plan.final is None or plan.layers is None:
        return (0, 0), 0
    return (plan.distill.start - plan.final.start, plan.distill.stop - plan.final.start), plan.layers.start - plan.final.start


def collect(plan: Plan, chunk: Chunk) -> None:
    """All dense statistics in one pass."""
    from ilrec_kernels import dense_triton  # Triton reads TRITON_INTERPRET when a kernel is defined

    z, stats = chunk.z_final, chunk.stats
    assert z is not None and stats is not None
    distill, shift = layout(plan)
    sent = None
    if plan.softmax and chunk.sent.slot.numel():
        sent = torch.zeros(z.shape, dtype=torch.int8, device=z.device)
        sent.view(-1).index_fill_(0, chunk.sent.slot, 1)
    layers = chunk.z_layers if plan.distill is not None else None
    values = dense_triton.statistics(z, layers, sent, distill, shift, plan.softmax, plan.distill is not None)
    if plan.softmax:
        if z.shape[1]:
            stats.z_target = z[chunk.row, chunk.y].masked_fill_(~chunk.owned, 0.0)
        stats.top, stats.rest = values[0], values[1]
    if plan.distill is not None:
        stats.teacher_top, stats.teacher_rest = values[2], values[3]
        stats.layer_top, stats.layer_rest, stats.cross = values[4], values[5], values[6]


def slice_statistics(z: Tensor, layers: Tensor | None, sent: Tensor | None, distill: tuple[int, int]) -> tuple[Tensor, ...]:
    """Of a slice's logits z [n, w] and layers [m, n, w], as dense_triton.statistics; `sent` int8 [n, w] marks what the normaliser leaves out."""
    from ilrec_kernels import dense_triton

    return dense_triton.statistics(z, layers, sent, distill, 0, True, layers is not None)


def candidates(source: Tensor, bar: Tensor, position: Tensor, k: int, budget: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As select.dense_candidates, of source [layers, n, c] without the target's column `position` [n] (−1: not here); and which rows had more, bool [n].

    The device is asked once, unless rows have more than k.
    """
    from ilrec_kernels import dense_triton

    n, capacity = source.shape[1], dense_triton.GATE_CAPACITY
    columns, values, counts = dense_triton.gate(source, bar, position)
    over = counts > k
    listed = counts.masked_fill(counts > capacity, 0).long()
    total, most = torch.stack([listed.sum(), counts.amax().long()]).tolist() if n else (0, 0)
    row = torch.repeat_interleave(torch.arange(n, device=counts.device), listed, output_size=total)
    place = torch.arange(total, device=counts.device) - (listed.cumsum(0) - listed).take(row)
    column, value = columns[row, place].long(), values[row, place]
    if most <= k:
        return row, column, value, over
    keep, _ = keep_largest(row, value, n, k, budget)
    parts = [(row, column, value) if keep is None else (row.take(keep), column.take(keep), value.take(keep))]
    if most <= capacity:
        return *parts[0], over
    for some in (counts > capacity).nonzero().flatten().split(max(1, budget // (8 * source.shape[2]))):
        mean = source[0, some]
        for layer in source[1:]:
            mean += layer[some]
        mean /= source.shape[0]
        here = (position[some] >= 0).nonzero().flatten()
        mean[here, position[some[here]]] = -torch.inf
        r, c, v = dense_candidates(mean, bar[some], k, budget)
        parts.append((some[r], c, v))
    row, column, value = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = torch.argsort(row, stable=True)
    return row[order], column[order], value[order], over


def finish(p: Problem, plan: Plan, chunk: Chunk, factors: Factors) -> tuple[Tensor, Tensor | None]:
    """The chunk's logits as gradients [n, c] and, with dense distillation, [m, n, c']."""
    from ilrec_kernels import dense_triton

    z = chunk.z_final
    assert z is not None
    distill, shift = layout(plan)
    layers = chunk.z_layers if factors.teacher is not None and plan.distill is not None else None
    table = factor_table(chunk, factors, len(layers) if layers is not None else 0, plan.softmax)
    target = chunk.y.masked_fill(~chunk.owned, -1)
    g, g_layers = dense_triton.gradients(z, layers, table, target, distill, shift, plan.softmax, layers is not None, gradient_dtype(p))
    if plan.softmax and factors.sent.numel():
        columns = z.shape[1]
        g[chunk.sent.slot // columns, chunk.sent.slot % columns] = factors.sent.to(g.dtype)
    return g, g_layers


def turn(p: Problem, z: Tensor, table: Tensor, target: Tensor, distill: tuple[int, int]) -> Tensor:
    """As finish, for a slice's logits z [streams, n, w]; returns the final layer's gradients, the first matrix of the stack."""
    from ilrec_kernels import dense_triton

    layers = z[1:] if z.shape[0] > 1 else None
    return dense_triton.gradients(z[0], layers, table, target, distill, 0, True, layers is not None, gradient_dtype(p))[0]


def factor_table(chunk: Chunk, factors: Factors, layers: int, softmax: bool) -> Tensor:
    """The row factors as gradients_kernel reads them."""
    from ilrec_kernels import dense_triton

    stats = chunk.stats
    assert stats is not None
    size = dense_triton.tile(layers)
    table = torch.zeros(chunk.n, 5 + 2 * size, dtype=factors.final.dtype, device=factors.final.device)
    if softmax:
        table[:, 0], table[:, 1], table[:, 2] = finite(stats.top), factors.final, factors.target
    if layers and factors.teacher is not None and factors.layer is not None:
        table[:, 3], table[:, 4] = finite(stats.teacher_top), factors.teacher
        table[:, 5 : 5 + layers] = finite(stats.layer_top).T
        table[:, 5 + size : 5 + size + layers] = factors.layer.T
    return table
