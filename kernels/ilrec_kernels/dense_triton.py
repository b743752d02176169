"""Triton kernels of both regimes: one pass over a chunk's logits for every statistic and the candidates for H, one that turns them into gradients.

A program owns a row and walks its columns in order, so results do not depend on scheduling: no atomics, no locks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ilrec_kernels.listed import Gate, Listed

# the one configuration that the dispatcher launches
BLOCK = 1024  # columns at a time
PART = 256  # of which so many are looked through for candidates at a time
ROOM = 512  # candidates that a row's list has room for: at least those wanted and a part's
WANTED = 256  # what a power of two above any number of wanted ones is
LAYERS = 16  # intermediate layers, at most
LAUNCH = {
    "num_warps": 4,
    "maxnreg": 128,
}  # registers of a thread: so four rows at least are worked on by a multiprocessor at once

LEAST = tl.constexpr(-(1 << 31))
GREATEST = tl.constexpr((1 << 31) - 1)


@triton.jit
def by_size(value):
    """int32 that ascend with fp32 values."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # no −0
    return bits ^ ((bits >> 31) & GREATEST)


@triton.jit
def add(top, rest, z):
    """Running maximum and sum of exponentials, with more values z, of which −inf adds nothing."""
    highest = tl.maximum(top, tl.max(z, 0))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, rest * tl.exp(top - base) + tl.sum(tl.exp(z - base), 0)


@triton.jit
def keep_largest(
    columns, values, held, k, floor, final, top, rest, SOFTMAX: tl.constexpr, ROOM: tl.constexpr
):
    """Of a list of `held` ≥ k candidates (ascending by column) only the k largest stay, ties to the lower column; what goes is added to the normaliser.

    Returns what z̄ must exceed from now on to be among them, for a candidate at a higher column, and the normaliser.
    """
    place = tl.arange(0, ROOM)
    there = place < held
    tl.debug_barrier()  # what other threads put on the list
    column = tl.load(columns + place, mask=there, other=0)
    value = tl.load(values + place, mask=there, other=float("-inf"))
    order = by_size(value)
    low = tl.full((), LEAST, tl.int64)
    high = tl.full((), GREATEST, tl.int64)
    for _ in range(32):  # the k-th largest, by halves
        middle = (low + high + 1) >> 1
        enough = tl.sum((there & (order >= middle)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = there & (order > low)
    tied = there & (order == low)
    kept = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= k - tl.sum(above.to(tl.int32), 0)))
    if SOFTMAX:
        top, rest = add(
            top, rest, tl.load(final + column, mask=there & (kept == 0), other=float("-inf"))
        )
    floor = tl.maximum(floor, tl.min(tl.where(kept, value, float("inf")), 0))
    to = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.debug_barrier()  # every thread has read the list before any overwrites it
    tl.store(columns + to, column, mask=kept)
    tl.store(values + to, value, mask=kept)
    return floor, top, rest


@triton.jit(
    do_not_specialize=["low", "high", "first", "last", "m", "k"]
)  # compared with only: a form for each of their kinds would be compiled mid-run
def statistics_kernel(
    final, layers, sent, out, bars, floors, targets, list_columns, list_values, columns_out, values_out, logits_out, found_out,
    c, low, high, first, last, shift, layer_columns, m, k, share, stride_final, stride_layer, stride_layer_row,
    SOFTMAX: tl.constexpr, EXCLUDE: tl.constexpr, DISTILL: tl.constexpr, GATE: tl.constexpr,
    LAYERS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """out[row] = top, rest, teacher_top, teacher_rest, then m each of layer_top, layer_rest, cross (METHOD.md §7).

    Distillation covers columns [low, high) of `final`; layer column = column − shift. The normaliser leaves out what `sent` marks with 1 (EXCLUDE), or
    what is listed: with GATE "layers" or "final" the up to k columns in [first, last), but for the target's, of the largest z̄ that reach bars[row] and
    exceed floors[row] (METHOD.md §2). They go out by ascending column, with z̄ and the final layer's logit, and the number of all that reach the bar.
    The list is filled as candidates come; when it is full the k largest stay, and from then on only larger ones come.
    """
    row = tl.program_id(0).to(tl.int64)
    final += row * stride_final
    sent += row * stride_final
    layers += row * stride_layer_row
    stream = tl.arange(0, LAYERS)
    top = float("-inf")
    rest = 0.0
    teacher_top = float("-inf")
    teacher_rest = 0.0
    layer_top = tl.full([LAYERS], float("-inf"), tl.float32)
    layer_rest = tl.zeros([LAYERS], tl.float32)
    cross = tl.zeros([LAYERS], tl.float32)
    if GATE != "":
        bar = tl.load(bars + row)
        floor = tl.load(floors + row)
        target = tl.load(targets + row)
        list_columns += row * ROOM
        list_values += row * ROOM
        held = 0
        found = 0
    for start in range(0, c, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < c
        z = tl.load(final + column, mask=inside, other=float("-inf"))
        ensemble = z
        if DISTILL or GATE == "layers":
            if GATE == "layers":
                ensemble = tl.zeros([BLOCK], tl.float32)
            if ((start < high) & (start + BLOCK > low)) | (
                (start < last) & (start + BLOCK > first)
            ):
                real = (column >= shift) & (column < shift + layer_columns)
                at = layers
                student = tl.load(at + (column - shift), mask=real, other=float("-inf"))
                if DISTILL:
                    scope = (column >= low) & (column < high)
                    teacher = tl.where(scope, z, float("-inf"))
                    highest = tl.maximum(teacher_top, tl.max(teacher, 0))
                    base = tl.where(highest == float("-inf"), 0.0, highest)
                    shrink = tl.exp(teacher_top - base)
                    weight = tl.exp(teacher - base)
                    teacher_rest = teacher_rest * shrink + tl.sum(weight, 0)
                    teacher_top = highest
                    cross *= shrink
                for layer in range(m):
                    at += stride_layer
                    following = tl.load(
                        at + (column - shift), mask=real & (layer + 1 < m), other=float("-inf")
                    )  # under way while this layer is worked on
                    if GATE == "layers":
                        ensemble += student
                    if DISTILL:
                        this = stream == layer
                        cross += tl.where(
                            this, tl.sum(tl.where(scope, weight * (z - student), 0.0), 0), 0.0
                        )
                        before = tl.max(tl.where(this, layer_top, float("-inf")), 0)
                        highest, total = add(
                            before,
                            tl.sum(tl.where(this, layer_rest, 0.0), 0),
                            tl.where(scope, student, float("-inf")),
                        )
                        layer_top = tl.where(this, highest, layer_top)
                        layer_rest = tl.where(this, total, layer_rest)
                    student = following
                if GATE == "layers":
                    ensemble *= share
        fresh = 0
        if GATE != "":
            passed = (ensemble >= bar) & (column >= first) & (column < last) & (column != target)
            both = tl.sum(
                passed.to(tl.int32) + ((passed & (ensemble > floor)).to(tl.int32) << 16), 0
            )  # two counts of at most BLOCK each
            found += both & 0xFFFF
            fresh = both >> 16
            if fresh > 0:
                for begin in range(start, tl.minimum(start + BLOCK, c), PART):
                    some = begin + tl.arange(0, PART)
                    kept = tl.load(final + some, mask=some < c, other=float("-inf"))
                    value = kept
                    if GATE == "layers":
                        value = tl.zeros([PART], tl.float32)
                        real = (some >= shift) & (some < shift + layer_columns)
                        at = layers
                        for _ in range(m):
                            value += tl.load(at + (some - shift), mask=real, other=float("-inf"))
                            at += stride_layer
                        value *= share
                    new = (
                        (value >= bar)
                        & (value > floor)
                        & (some >= first)
                        & (some < last)
                        & (some != target)
                    )
                    if held + tl.sum(new.to(tl.int32), 0) > ROOM:
                        floor, top, rest = keep_largest(
                            list_columns,
                            list_values,
                            held,
                            k,
                            floor,
                            final,
                            top,
                            rest,
                            SOFTMAX,
                            ROOM,
                        )
                        held = k
                        new = new & (value > floor)
                    place = held + tl.cumsum(new.to(tl.int32), 0) - 1
                    tl.store(list_columns + place, some, mask=new)
                    tl.store(list_values + place, value, mask=new)
                    held += tl.sum(new.to(tl.int32), 0)
                    if SOFTMAX:
                        top, rest = add(top, rest, tl.where(new, float("-inf"), kept))
        if SOFTMAX:
            if EXCLUDE:
                marked = tl.load(sent + column, mask=inside, other=0)
                z = tl.where(marked != 0, float("-inf"), z)
            if fresh == 0:
                top, rest = add(top, rest, z)
    if GATE != "":
        if held > k:
            floor, top, rest = keep_largest(
                list_columns, list_values, held, k, floor, final, top, rest, SOFTMAX, ROOM
            )
            held = k
        tl.debug_barrier()
        place = tl.arange(0, ROOM)
        there = place < held
        column = tl.load(list_columns + place, mask=there, other=-1)
        tl.store(columns_out + row * k + place, column, mask=place < k)
        tl.store(
            values_out + row * k + place,
            tl.load(list_values + place, mask=there, other=float("-inf")),
            mask=place < k,
        )
        tl.store(
            logits_out + row * k + place,
            tl.load(final + column, mask=there, other=float("-inf")),
            mask=place < k,
        )
        tl.store(found_out + row, found)
    out += row * (4 + 3 * m)
    tl.store(out, top)
    tl.store(out + 1, rest)
    tl.store(out + 2, teacher_top)
    tl.store(out + 3, teacher_rest)
    tl.store(out + 4 + stream, layer_top, mask=stream < m)
    tl.store(out + 4 + m + stream, layer_rest, mask=stream < m)
    tl.store(out + 4 + 2 * m + stream, cross, mask=stream < m)


@triton.jit(do_not_specialize=["low", "high", "m", "k"])
def gradients_kernel(
    final, layers, final_out, layers_out, factors, targets, listed, listed_gradients,
    c, low, high, shift, layer_columns, m, k, stride_final, stride_layer, stride_layer_row, stride_final_out, stride_layer_out, stride_layer_row_out,
    SOFTMAX: tl.constexpr, DISTILL: tl.constexpr, LISTED: tl.constexpr, WANTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits become gradients in place. With a half-precision head the outputs are the same memory seen in that dtype (with strides in its elements):
    a row's gradients take the first half of its bytes, behind what the row's program has already read.

    factors[row] = e-factor of the final layer (log), its linear factor, what the target adds, teacher_top, teacher factor, then m each of
    layer_top and layer factor. targets[row] is the target's column or −1. LISTED: listed[row] are k columns (−1: none) that get listed_gradients.
    """
    row = tl.program_id(0).to(tl.int64)
    factors += row * (5 + 2 * m)
    top = tl.load(factors)
    factor = tl.load(factors + 1)
    at_target = tl.load(factors + 2)
    teacher_top = tl.load(factors + 3)
    own = tl.load(factors + 4)
    target = tl.load(targets + row)
    final += row * stride_final
    final_out += row * stride_final_out
    layers += row * stride_layer_row
    layers_out += row * stride_layer_row_out
    for start in range(0, c, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < c
        z = tl.load(final + column, mask=inside, other=float("-inf"))
        tl.debug_barrier()  # every thread has read this block before any overwrites it
        if SOFTMAX:
            g = factor * tl.exp(z - top) + tl.where(column == target, at_target, 0.0)
            tl.store(final_out + column, g, mask=inside)
        if DISTILL:
            if (start < shift + layer_columns) & (start + BLOCK > shift):
                scope = (column >= low) & (column < high)
                real = (column >= shift) & (column < shift + layer_columns)
                teacher = tl.where(scope, own * tl.exp(z - teacher_top), 0.0)  # own is negative
                at = layers + (column - shift)
                to = layers_out + (column - shift)
                student = tl.load(at, mask=real, other=float("-inf"))
                for layer in range(m):
                    at += stride_layer
                    following = tl.load(
                        at, mask=real & (layer + 1 < m), other=float("-inf")
                    )  # another row: nothing here overwrites it
                    layer_top = tl.load(factors + 5 + layer)
                    other = tl.load(factors + 5 + m + layer)
                    g = tl.where(scope, other * tl.exp(student - layer_top) + teacher, 0.0)
                    tl.debug_barrier()
                    tl.store(to, g, mask=real)
                    to += stride_layer_out
                    student = following
    if LISTED:
        tl.debug_barrier()  # what the blocks wrote is overwritten
        place = tl.arange(0, WANTED)
        column = tl.load(listed + row * k + place, mask=place < k, other=-1)
        g = tl.load(listed_gradients + row * k + place, mask=column >= 0, other=0.0)
        tl.store(final_out + column, g, mask=column >= 0)


def check_layers(count: int) -> None:
    if count > LAYERS:
        raise ValueError(
            f"layer_hidden: the triton backend takes at most {LAYERS} layers, got {count}"
        )


def statistics(
    final: Tensor, layers: Tensor | None, sent: Tensor | None, distill: tuple[int, int], shift: int, softmax: bool, has_distill: bool, gate: Gate | None = None
) -> tuple[tuple[Tensor, ...], Listed | None]:  # fmt: skip
    """(top, rest, teacher_top, teacher_rest [n]; layer_top, layer_rest, cross [m, n]) from fp32 logits final [n, c], layers [m, n, c']; and the candidates."""
    n, c = final.shape
    m = 0 if layers is None else layers.shape[0]
    check_layers(m)
    out = final.new_empty(n, 4 + 3 * m)
    matrix = layers if layers is not None else final[None]
    kind, listed, lists = "", None, (final,) * 9
    if gate is not None:
        kind = "final" if gate.from_final else "layers"
        places, values, z = (
            final.new_empty(n, gate.k, dtype=torch.int32),
            final.new_empty(n, gate.k),
            final.new_empty(n, gate.k),
        )
        listed = Listed(places, values, z, places.new_empty(n))
        lists = (
            gate.bars,
            gate.floors,
            gate.targets,
            places.new_empty(n, ROOM),
            final.new_empty(n, ROOM),
            places,
            values,
            z,
            listed.found,
        )
    if n:
        with torch.cuda.device_of(final):
            statistics_kernel[(n,)](
                final, matrix, sent if sent is not None else final, out, *lists, c, *distill, gate.first if gate else 0, gate.last if gate else 0, shift,
                matrix.shape[-1], m, gate.k if gate else 0, 1 / max(m, 1), final.stride(0), matrix.stride(0), matrix.stride(1), SOFTMAX=softmax,
                EXCLUDE=sent is not None, DISTILL=has_distill, GATE=kind, LAYERS=LAYERS, ROOM=ROOM, BLOCK=BLOCK, PART=PART, **LAUNCH,
            )  # fmt: skip
    head = out[:, :4].T.contiguous()
    tail = (
        out[:, 4:].unflatten(1, (3, m)).permute(1, 2, 0).contiguous()
        if m
        else out.new_empty(3, 0, n)
    )
    return (*head.unbind(0), *tail.unbind(0)), listed


def gradients(
    final: Tensor, layers: Tensor | None, factors: Tensor, targets: Tensor, distill: tuple[int, int], shift: int, softmax: bool, has_distill: bool,
    low: torch.dtype, listed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Overwrite the logits; returns the gradients [n, c] and [m, n, c'] as views of the same memory, in dtype `low`.

    `listed`: columns of the final layer (int32 [n, k], −1: none) and what their gradients are, fp32 [n, k].
    """
    n, c = final.shape
    m = layers.shape[0] if layers is not None and has_distill else 0
    matrix = layers if layers is not None else final[None]
    final_out, layers_out = final.view(low), matrix.view(low)
    if n:
        columns, values = listed if listed is not None else (targets, targets)
        with torch.cuda.device_of(final):
            gradients_kernel[(n,)](
                final, matrix, final_out, layers_out, factors, targets, columns, values, c, *distill, shift, matrix.shape[-1], m,
                columns.shape[1] if listed is not None else 0, final.stride(0), matrix.stride(0), matrix.stride(1), final_out.stride(0), layers_out.stride(0),
                layers_out.stride(1), SOFTMAX=softmax, DISTILL=has_distill, LISTED=listed is not None, WANTED=WANTED, BLOCK=BLOCK, **LAUNCH,
            )  # fmt: skip
    return final_out[:, :c], layers_out[..., : matrix.shape[-1]] if layers is not None else None
