"""How the `triton` backend's row kernels take the place of the torch backend's passes over a chunk's dense logits (regime T)."""

from __future__ import annotations

import torch
from torch import Tensor

from ilrec_kernels.listed import Gate, Listed
from ilrec_kernels.problem import Plan, Problem
from ilrec_kernels.segments import finite
from ilrec_kernels.state import Chunk, Factors


def gradient_dtype(p: Problem) -> torch.dtype:
    """The head's own dtype: gradients at the logits are rounded to it once, when the kernel stores them."""
    return p.head.dtype


def layout(plan: Plan) -> tuple[tuple[int, int], int]:
    """((first, last) distill column of the final layer's matrix, by how much the layers' columns are shifted against it)."""
    if plan.final is None or plan.layers is None:
        return (0, 0), 0
    distill = (
        (0, 0)
        if plan.distill is None
        else (plan.distill.start - plan.final.start, plan.distill.stop - plan.final.start)
    )
    return distill, plan.layers.start - plan.final.start


def collect(plan: Plan, chunk: Chunk) -> Listed | None:
    """All dense statistics, and the candidates that chunk.gate lets through, in one pass."""
    from ilrec_kernels import dense_triton  # Triton reads TRITON_INTERPRET when a kernel is defined

    z, stats = chunk.z_final, chunk.stats
    assert z is not None and stats is not None
    distill, shift = layout(plan)
    sent = None
    if plan.softmax and chunk.sent.slot.numel():
        sent = torch.zeros(z.shape, dtype=torch.int8, device=z.device)
        sent.view(-1).index_fill_(0, chunk.sent.slot, 1)
    needed = plan.distill is not None or (chunk.gate is not None and not chunk.gate.from_final)
    layers = chunk.z_layers if needed else None
    values, listed = dense_triton.statistics(
        z, layers, sent, distill, shift, plan.softmax, plan.distill is not None, chunk.gate
    )
    if plan.softmax:
        if z.shape[1]:
            stats.z_target = z[chunk.row, chunk.y].masked_fill_(~chunk.owned, 0.0)
        stats.top, stats.rest = values[0], values[1]
    if plan.distill is not None:
        stats.teacher_top, stats.teacher_rest = values[2], values[3]
        stats.layer_top, stats.layer_rest, stats.cross = values[4], values[5], values[6]
    return listed


def slice_statistics(
    z: Tensor,
    layers: Tensor | None,
    sent: Tensor | None,
    distill: tuple[int, int],
    gate: Gate | None,
) -> tuple[tuple[Tensor, ...], Listed | None]:
    """Of a slice's logits z [n, w] and layers [m, n, w], as dense_triton.statistics; `sent` int8 [n, w] marks what the normaliser leaves out."""
    from ilrec_kernels import dense_triton

    return dense_triton.statistics(z, layers, sent, distill, 0, True, distill[1] > distill[0], gate)


def finish(p: Problem, plan: Plan, chunk: Chunk, factors: Factors) -> tuple[Tensor, Tensor | None]:
    """The chunk's logits as gradients [n, c] and, with dense distillation, [m, n, c']."""
    from ilrec_kernels import dense_triton

    z = chunk.z_final
    assert z is not None
    distill, shift = layout(plan)
    layers = chunk.z_layers if factors.teacher is not None and plan.distill is not None else None
    table = factor_table(chunk, factors, len(layers) if layers is not None else 0, plan.softmax)
    target = chunk.y.masked_fill(~chunk.owned, -1)
    listed = None
    if plan.softmax and chunk.listed is not None:
        listed = chunk.listed.columns, listed_gradients(chunk, factors)
    g, g_layers = dense_triton.gradients(
        z,
        layers,
        table,
        target,
        distill,
        shift,
        plan.softmax,
        layers is not None,
        gradient_dtype(p),
        listed,
    )
    if plan.softmax and listed is None and factors.sent.numel():
        columns = z.shape[1]
        g[chunk.sent.slot // columns, chunk.sent.slot % columns] = factors.sent.to(g.dtype)
    return g, g_layers


def listed_gradients(chunk: Chunk, factors: Factors) -> Tensor:
    """What the listed candidates' gradients are, [n, k] as chunk.listed."""
    assert chunk.listed is not None
    shape = chunk.listed.columns.shape
    if chunk.place is None:
        return factors.sent.view(shape)
    return (
        factors.sent.new_zeros(shape.numel()).index_copy_(0, chunk.place, factors.sent).view(shape)
    )


def turn(
    p: Problem,
    z: Tensor,
    table: Tensor,
    target: Tensor,
    distill: tuple[int, int],
    listed: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """As finish, for a slice's logits z [streams, n, w]; returns the final layer's gradients, the first matrix of the stack."""
    from ilrec_kernels import dense_triton

    layers = z[1:] if z.shape[0] > 1 else None
    return dense_triton.gradients(
        z[0], layers, table, target, distill, 0, True, layers is not None, gradient_dtype(p), listed
    )[0]


def factor_table(chunk: Chunk, factors: Factors, layers: int, softmax: bool) -> Tensor:
    """The row factors as gradients_kernel reads them."""
    stats = chunk.stats
    assert stats is not None
    table = torch.zeros(
        chunk.n, 5 + 2 * layers, dtype=factors.final.dtype, device=factors.final.device
    )
    if softmax:
        table[:, 0], table[:, 1], table[:, 2] = finite(stats.top), factors.final, factors.target
    if layers and factors.teacher is not None and factors.layer is not None:
        table[:, 3], table[:, 4] = finite(stats.teacher_top), factors.teacher
        table[:, 5 : 5 + layers] = finite(stats.layer_top).T
        table[:, 5 + layers :] = factors.layer.T
    return table
