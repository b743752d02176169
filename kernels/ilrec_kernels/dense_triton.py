"""Triton kernels of regime T: one pass over a chunk's logits for every statistic, one that turns them into gradients, one that finds candidates.

A program owns a row and walks its columns in order, so results do not depend on scheduling: no atomics, no locks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """One compiled form of a row kernel."""

    block: int  # columns at a time
    warps: int


# every configuration the dispatcher may launch; tests compile exactly these. The layers' tile is [M, block]: fewer columns with more layers
CONFIGS = {1: Config(2048, 8), 2: Config(1024, 8), 4: Config(1024, 8), 8: Config(256, 8)}
GATE = Config(1024, 4)
GATE_CAPACITY = 256  # candidates of a row that the gate lists; rows with more are redone by a full top-k


def tile(layers: int) -> int:
    """The power of two of layer rows in a tile."""
    size = triton.next_power_of_2(max(layers, 1))
    if size not in CONFIGS:
        raise ValueError(f"layer_hidden: the triton backend takes at most {max(CONFIGS)} layers, got {layers}")
    return size


@triton.jit
def statistics_kernel(
    final, layers, sent, out, c, low, high, shift, m, stride_final, stride_layer, stride_layer_row,
    SOFTMAX: tl.constexpr, EXCLUDE: tl.constexpr, DISTILL: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = top, rest, teacher_top, teacher_rest, then M each of layer_top, layer_rest, cross (METHOD.md §7).

    `sent` marks with 1 what the normaliser leaves out. Distillation covers columns [low, high) of `final`; layer column = column − shift.
    """
    row = tl.program_id(0).to(tl.int64)
    final += row * stride_final
    sent += row * stride_final
    stream = tl.arange(0, M)
    layer_rows = layers + stream[:, None].to(tl.int64) * stride_layer + row * stride_layer_row
    top = float("-inf")
    rest = 0.0
    teacher_top = float("-inf")
    teacher_rest = 0.0
    layer_top = tl.full([M], float("-inf"), tl.float32)
    layer_rest = tl.zeros([M], tl.float32)
    cross = tl.zeros([M], tl.float32)
    for start in range(0, c, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < c
        z = tl.load(final + column, mask=inside, other=float("-inf"))
        if SOFTMAX:
            kept = z
            if EXCLUDE:
                out_of = tl.load(sent + column, mask=inside, other=0)
                kept = tl.where(out_of != 0, float("-inf"), z)
            highest = tl.maximum(top, tl.max(kept, 0))
            base = tl.where(highest == float("-inf"), 0.0, highest)
            rest = rest * tl.exp(top - base) + tl.sum(tl.exp(kept - base), 0)
            top = highest
        if DISTILL:
            if (start < high) & (start + BLOCK > low):
                scope = (column >= low) & (column < high)
                teacher = tl.where(scope, z, float("-inf"))
                highest = tl.maximum(teacher_top, tl.max(teacher, 0))
                base = tl.where(highest == float("-inf"), 0.0, highest)
                shrink = tl.exp(teacher_top - base)
                weight = tl.exp(teacher - base)
                teacher_rest = teacher_rest * shrink + tl.sum(weight, 0)
                teacher_top = highest
                valid = (stream[:, None] < m) & scope[None, :]
                student = tl.load(layer_rows + (column - shift)[None, :], mask=valid, other=float("-inf"))
                gap = tl.where(valid, z[None, :] - student, 0.0)
                cross = cross * shrink + tl.sum(weight[None, :] * gap, 1)
                layer_highest = tl.maximum(layer_top, tl.max(student, 1))
                layer_base = tl.where(layer_highest == float("-inf"), 0.0, layer_highest)
                layer_rest = layer_rest * tl.exp(layer_top - layer_base) + tl.sum(tl.exp(student - layer_base[:, None]), 1)
                layer_top = layer_highest
    out += row * (4 + 3 * M)
    tl.store(out, top)
    tl.store(out + 1, rest)
    tl.store(out + 2, teacher_top)
    tl.store(out + 3, teacher_rest)
    tl.store(out + 4 + stream, layer_top)
    tl.store(out + 4 + M + stream, layer_rest)
    tl.store(out + 4 + 2 * M + stream, cross)


@triton.jit
def gradients_kernel(
    final, layers, final_out, layers_out, factors, targets, c, low, high, shift, layer_columns, m,
    stride_final, stride_layer, stride_layer_row, pack,
    SOFTMAX: tl.constexpr, DISTILL: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits become gradients in place. With a half-precision head the outputs are the same memory seen in that dtype, `pack` elements of it
    to one fp32: a row's gradients take the first half of its bytes, behind what the row's program has already read.

    factors[row] = e-factor of the final layer (log), its linear factor, what the target adds, teacher_top, teacher factor, then M each of
    layer_top and layer factor. targets[row] is the target's column or −1.
    """
    row = tl.program_id(0).to(tl.int64)
    stream = tl.arange(0, M)
    factors += row * (5 + 2 * M)
    top = tl.load(factors)
    factor = tl.load(factors + 1)
    at_target = tl.load(factors + 2)
    teacher_top = tl.load(factors + 3)
    own = tl.load(factors + 4)
    layer_top = tl.load(factors + 5 + stream)
    other = tl.load(factors + 5 + M + stream)
    target = tl.load(targets + row)
    layer_rows = stream[:, None].to(tl.int64) * stride_layer + row * stride_layer_row
    for start in range(0, c, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < c
        z = tl.load(final + row * stride_final + column, mask=inside, other=float("-inf"))
        if DISTILL:
            there = (column >= shift) & (column < shift + layer_columns)
            real = (stream[:, None] < m) & there[None, :]
            student = tl.load(layers + layer_rows + (column - shift)[None, :], mask=real, other=float("-inf"))
        tl.debug_barrier()  # every thread has read this block before any overwrites it
        if SOFTMAX:
            g = factor * tl.exp(z - top) + tl.where(column == target, at_target, 0.0)
            tl.store(final_out + row * stride_final * pack + column, g, mask=inside)
        if DISTILL:
            scope = (column >= low) & (column < high)
            teacher = tl.where(scope, own * tl.exp(z - teacher_top), 0.0)
            g = other[:, None] * tl.exp(student - layer_top[:, None]) + teacher[None, :]  # own is negative
            g = tl.where(scope[None, :], g, 0.0)
            tl.store(layers_out + layer_rows * pack + (column - shift)[None, :], g, mask=real)
        tl.debug_barrier()


@triton.jit
def gate_kernel(
    source, bars, targets, columns_out, values_out, counts, c, layers, stride, stride_layer,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the columns whose z̄ (mean of `layers` matrices, added in order) reaches the row's bar, ascending; the target is left out.

    counts[row] is how many there are, of which the first CAPACITY are listed.
    """
    row = tl.program_id(0).to(tl.int64)
    bar = tl.load(bars + row)
    target = tl.load(targets + row)
    found = 0
    for start in range(0, c, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < c
        place_in = source + row * stride + column
        z = tl.load(place_in, mask=inside, other=float("-inf"))
        for _ in range(1, layers):
            place_in += stride_layer
            z += tl.load(place_in, mask=inside, other=float("-inf"))
        z = z / layers
        passed = ((z >= bar) & inside & (column != target)).to(tl.int32)
        place = found + tl.cumsum(passed, 0) - 1
        keep = (passed != 0) & (place < CAPACITY)
        tl.store(columns_out + row * CAPACITY + place, column, mask=keep)
        tl.store(values_out + row * CAPACITY + place, z, mask=keep)
        found += tl.sum(passed, 0)
    tl.store(counts + row, found)


def statistics(
    final: Tensor, layers: Tensor | None, sent: Tensor | None, distill: tuple[int, int], shift: int, softmax: bool, has_distill: bool
) -> tuple[Tensor, ...]:
    """(top, rest, teacher_top, teacher_rest [n]; layer_top, layer_rest, cross [m, n]) from fp32 logits final [n, c], layers [m, n, c']."""
    n, c = final.shape
    m = layers.shape[0] if layers is not None and has_distill else 0
    size = tile(m)
    out = final.new_empty(n, 4 + 3 * size)
    matrix = layers if layers is not None else final[None]
    if n:
        config = CONFIGS[size]
        statistics_kernel[(n,)](
            final, matrix, sent if sent is not None else final, out, c, *distill, shift, m, final.stride(0), matrix.stride(0), matrix.stride(1),
            SOFTMAX=softmax, EXCLUDE=sent is not None, DISTILL=has_distill, M=size, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    head = out[:, :4].T.contiguous()
    tail = out[:, 4:].unflatten(1, (3, size))[:, :, :m].permute(1, 2, 0).contiguous()
    return (*head.unbind(0), *tail.unbind(0))


def gradients(
    final: Tensor, layers: Tensor | None, factors: Tensor, targets: Tensor, distill: tuple[int, int], shift: int, softmax: bool, has_distill: bool,
    low: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Overwrite the logits; returns the gradients [n, c] and [m, n, c'] as views of the same memory, in dtype `low`."""
    n, c = final.shape
    m = layers.shape[0] if layers is not None and has_distill else 0
    size = tile(m)
    matrix = layers if layers is not None else final[None]
    pack = final.element_size() // low.itemsize
    final_out, layers_out = final.view(low), matrix.view(low)
    if n:
        config = CONFIGS[size]
        gradients_kernel[(n,)](
            final, matrix, final_out, layers_out, factors, targets, c, *distill, shift, matrix.shape[-1], m, final.stride(0), matrix.stride(0),
            matrix.stride(1), pack, SOFTMAX=softmax, DISTILL=has_distill, M=size, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    return final_out[:, :c], layers_out[..., : matrix.shape[-1]] if layers is not None else None


def gate(source: Tensor, bars: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates of source [layers, n, c]: columns int32 and values [n, GATE_CAPACITY], a row's first ones filled, ascending; how many it has, int32 [n]."""
    layers, n, c = source.shape
    columns = torch.empty(n, GATE_CAPACITY, dtype=torch.int32, device=source.device)
    values = source.new_empty(n, GATE_CAPACITY)
    counts = torch.zeros(n, dtype=torch.int32, device=source.device)
    if n and c:
        gate_kernel[(n,)](
            source, bars, targets, columns, values, counts, c, layers, source.stride(1), source.stride(0),
            CAPACITY=GATE_CAPACITY, BLOCK=GATE.block, num_warps=GATE.warps,
        )  # fmt: skip
    return columns, values, counts
