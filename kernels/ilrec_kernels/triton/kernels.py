# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton's language has no types that mypy could check.
"""Triton kernels of counts regimes: one makes a row's statistics, one its gradients.

`statistics_kernel` passes once over a row's logits for every statistic and the
candidates for H; `gradients_kernel` turns the logits into gradients. A program owns a
row and walks its columns in order, so results do not depend on scheduling: no atomics,
no locks.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The one configuration that is launched.
# Columns at a time.
BLOCK = 1024
# Columns of a block that are looked through for candidates at a time. A candidate buffer
# has room for k candidates and those of one such part.
BLOCK_PART = 256
# A power of two that no k exceeds.
MAX_K = 256
# The largest number of intermediate layers.
MAX_LAYERS = 16
# With 128 registers a thread, a multiprocessor works on four rows at least at once.
LAUNCH_OPTIONS = {"num_warps": 4, "maxnreg": 128}

INT32_MIN = tl.constexpr(-(1 << 31))
INT32_MAX = tl.constexpr((1 << 31) - 1)


@triton.jit
def sortable(value):
    """Map fp32 values to int32 that ascend with them; −0 is 0."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & INT32_MAX)


@triton.jit
def add_to_softmax(row_max, sum_exp, z):
    """Add values z to a running maximum and sum of exponentials; −inf adds nothing."""
    highest = tl.maximum(row_max, tl.max(z, 0))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, sum_exp * tl.exp(row_max - base) + tl.sum(tl.exp(z - base), 0)


@triton.jit
def keep_k_largest(
    columns,
    values,
    held,
    k,
    kth_value,
    final,
    row_max,
    sum_exp,
    SOFTMAX: tl.constexpr,
    BUFFER: tl.constexpr,
):
    """Keep the k largest of a buffer of `held` ≥ k candidates, which ascend by column.

    Ties go to the lower column; the evicted are added to the normaliser. Returns what
    z̄ of a higher column must exceed from now on to be among the k, and the normaliser.
    """
    index = tl.arange(0, BUFFER)
    exists = index < held
    # Other threads have put candidates into the buffer.
    tl.debug_barrier()
    column = tl.load(columns + index, mask=exists, other=0)
    value = tl.load(values + index, mask=exists, other=float("-inf"))
    order = sortable(value)
    # The k-th largest is found by halving the range of values.
    low = tl.full((), INT32_MIN, tl.int64)
    high = tl.full((), INT32_MAX, tl.int64)
    for _ in range(32):
        middle = (low + high + 1) >> 1
        enough = tl.sum((exists & (order >= middle)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = exists & (order > low)
    tied = exists & (order == low)
    room = k - tl.sum(above.to(tl.int32), 0)
    kept = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    if SOFTMAX:
        evicted = tl.load(final + column, mask=exists & (kept == 0), other=float("-inf"))
        row_max, sum_exp = add_to_softmax(row_max, sum_exp, evicted)
    kth_value = tl.maximum(kth_value, tl.min(tl.where(kept, value, float("inf")), 0))
    to = tl.cumsum(kept.to(tl.int32), 0) - 1
    # Every thread has read the buffer before any overwrites it.
    tl.debug_barrier()
    tl.store(columns + to, column, mask=kept)
    tl.store(values + to, value, mask=kept)
    return kth_value, row_max, sum_exp


@triton.jit
def collect_candidates(
    start,
    final,
    layers,
    buffer_columns,
    buffer_values,
    held,
    threshold,
    kth_value,
    target,
    row_max,
    sum_exp,
    c,
    first,
    last,
    shift,
    layer_columns,
    m,
    k,
    share,
    stride_layer,
    SOFTMAX: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BUFFER: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Put the candidates of a block into the row's buffer, a part of the block at a
    time.

    When the buffer is full the k largest stay. What is not put there goes to the
    normaliser. Returns (held, kth_value, row_max, sum_exp).
    """
    for begin in range(start, tl.minimum(start + BLOCK, c), PART):
        column = begin + tl.arange(0, PART)
        z = tl.load(final + column, mask=column < c, other=float("-inf"))
        value = z
        if CANDIDATES == "layers":
            value = tl.zeros([PART], tl.float32)
            real = (column >= shift) & (column < shift + layer_columns)
            at = layers
            for _ in range(m):
                value += tl.load(at + (column - shift), mask=real, other=float("-inf"))
                at += stride_layer
            value *= share
        new = (
            (value >= threshold)
            & (value > kth_value)
            & (column >= first)
            & (column < last)
            & (column != target)
        )
        if held + tl.sum(new.to(tl.int32), 0) > BUFFER:
            kth_value, row_max, sum_exp = keep_k_largest(
                buffer_columns,
                buffer_values,
                held,
                k,
                kth_value,
                final,
                row_max,
                sum_exp,
                SOFTMAX,
                BUFFER,
            )
            held = k
            new = new & (value > kth_value)
        index = held + tl.cumsum(new.to(tl.int32), 0) - 1
        tl.store(buffer_columns + index, column, mask=new)
        tl.store(buffer_values + index, value, mask=new)
        held += tl.sum(new.to(tl.int32), 0)
        if SOFTMAX:
            row_max, sum_exp = add_to_softmax(row_max, sum_exp, tl.where(new, float("-inf"), z))
    return held, kth_value, row_max, sum_exp


# Sizes that are only compared with are not specialised: a form for each of their kinds
# would be compiled mid-run.
@triton.jit(do_not_specialize=["low", "high", "first", "last", "m", "k"])
def statistics_kernel(
    final,
    layers,
    excluded,
    out,
    thresholds,
    kth_values,
    targets,
    buffer_columns,
    buffer_values,
    columns_out,
    values_out,
    logits_out,
    passed_out,
    c,
    low,
    high,
    first,
    last,
    shift,
    layer_columns,
    m,
    k,
    share,
    stride_final,
    stride_layer,
    stride_layer_row,
    SOFTMAX: tl.constexpr,
    EXCLUDE: tl.constexpr,
    DISTILL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    LAYERS: tl.constexpr,
    BUFFER: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Compute a row's statistics (METHOD.md §7), and collect its candidates (§2).

    out[row] is row_max, sum_exp, teacher_max, teacher_sum, then m each
    of layer_max, layer_sum, cross. Distillation covers columns [low,
    high) of `final`; a layer's column is the final layer's − shift.

    The normaliser leaves out what `excluded` marks with 1 (EXCLUDE), or the candidates
    collected: with CANDIDATES "layers" or "final" the up to k columns of [first, last),
    without the target's, of the largest z̄ that reach thresholds[row] and exceed
    kth_values[row]. They go out by ascending column, with z̄, the final layer's logit,
    and the number of all that reach the threshold. The buffer is filled as candidates
    come; when it is full the k largest stay, and from then on only larger ones come.
    """
    row = tl.program_id(0).to(tl.int64)
    final += row * stride_final
    excluded += row * stride_final
    layers += row * stride_layer_row
    stream = tl.arange(0, LAYERS)
    row_max = float("-inf")
    sum_exp = 0.0
    teacher_max = float("-inf")
    teacher_sum = 0.0
    layer_max = tl.full([LAYERS], float("-inf"), tl.float32)
    layer_sum = tl.zeros([LAYERS], tl.float32)
    cross = tl.zeros([LAYERS], tl.float32)
    if CANDIDATES != "":
        threshold = tl.load(thresholds + row)
        kth_value = tl.load(kth_values + row)
        target = tl.load(targets + row)
        buffer_columns += row * BUFFER
        buffer_values += row * BUFFER
        held = 0
        passed_count = 0
    for start in range(0, c, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < c
        z = tl.load(final + column, mask=inside, other=float("-inf"))
        ensemble = z
        if DISTILL or CANDIDATES == "layers":
            if CANDIDATES == "layers":
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
                    highest = tl.maximum(teacher_max, tl.max(teacher, 0))
                    base = tl.where(highest == float("-inf"), 0.0, highest)
                    shrink = tl.exp(teacher_max - base)
                    weight = tl.exp(teacher - base)
                    teacher_sum = teacher_sum * shrink + tl.sum(weight, 0)
                    teacher_max = highest
                    cross *= shrink
                for layer in range(m):
                    at += stride_layer
                    # The next layer is being loaded while this one is worked on.
                    following = tl.load(
                        at + (column - shift), mask=real & (layer + 1 < m), other=float("-inf")
                    )
                    if CANDIDATES == "layers":
                        ensemble += student
                    if DISTILL:
                        this = stream == layer
                        difference = tl.where(scope, weight * (z - student), 0.0)
                        cross += tl.where(this, tl.sum(difference, 0), 0.0)
                        highest, total = add_to_softmax(
                            tl.max(tl.where(this, layer_max, float("-inf")), 0),
                            tl.sum(tl.where(this, layer_sum, 0.0), 0),
                            tl.where(scope, student, float("-inf")),
                        )
                        layer_max = tl.where(this, highest, layer_max)
                        layer_sum = tl.where(this, total, layer_sum)
                    student = following
                if CANDIDATES == "layers":
                    ensemble *= share
        new_count = 0
        if CANDIDATES != "":
            passed = (ensemble >= threshold) & (column >= first) & (column < last)
            passed &= column != target
            new = passed & (ensemble > kth_value)
            # Two counts of at most BLOCK each are summed as one number.
            counts = tl.sum(passed.to(tl.int32) + (new.to(tl.int32) << 16), 0)
            passed_count += counts & 0xFFFF
            new_count = counts >> 16
            if new_count > 0:
                held, kth_value, row_max, sum_exp = collect_candidates(
                    start,
                    final,
                    layers,
                    buffer_columns,
                    buffer_values,
                    held,
                    threshold,
                    kth_value,
                    target,
                    row_max,
                    sum_exp,
                    c,
                    first,
                    last,
                    shift,
                    layer_columns,
                    m,
                    k,
                    share,
                    stride_layer,
                    SOFTMAX,
                    CANDIDATES,
                    BUFFER,
                    BLOCK,
                    PART,
                )
        if SOFTMAX:
            if EXCLUDE:
                marked = tl.load(excluded + column, mask=inside, other=0)
                z = tl.where(marked != 0, float("-inf"), z)
            if new_count == 0:
                row_max, sum_exp = add_to_softmax(row_max, sum_exp, z)
    if CANDIDATES != "":
        if held > k:
            kth_value, row_max, sum_exp = keep_k_largest(
                buffer_columns,
                buffer_values,
                held,
                k,
                kth_value,
                final,
                row_max,
                sum_exp,
                SOFTMAX,
                BUFFER,
            )
            held = k
        tl.debug_barrier()
        index = tl.arange(0, BUFFER)
        exists = index < held
        column = tl.load(buffer_columns + index, mask=exists, other=-1)
        value = tl.load(buffer_values + index, mask=exists, other=float("-inf"))
        z = tl.load(final + column, mask=exists, other=float("-inf"))
        tl.store(columns_out + row * k + index, column, mask=index < k)
        tl.store(values_out + row * k + index, value, mask=index < k)
        tl.store(logits_out + row * k + index, z, mask=index < k)
        tl.store(passed_out + row, passed_count)
    out += row * (4 + 3 * m)
    tl.store(out, row_max)
    tl.store(out + 1, sum_exp)
    tl.store(out + 2, teacher_max)
    tl.store(out + 3, teacher_sum)
    tl.store(out + 4 + stream, layer_max, mask=stream < m)
    tl.store(out + 4 + m + stream, layer_sum, mask=stream < m)
    tl.store(out + 4 + 2 * m + stream, cross, mask=stream < m)


@triton.jit(do_not_specialize=["low", "high", "m", "k"])
def gradients_kernel(
    final,
    layers,
    final_out,
    layers_out,
    factors,
    targets,
    buffer_columns,
    buffer_gradients,
    c,
    low,
    high,
    shift,
    layer_columns,
    m,
    k,
    stride_final,
    stride_layer,
    stride_layer_row,
    stride_final_out,
    stride_layer_out,
    stride_layer_row_out,
    SOFTMAX: tl.constexpr,
    DISTILL: tl.constexpr,
    BUFFERED: tl.constexpr,
    MAX_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn a row's logits into gradients in place.

    With a half-precision head the outputs are the same memory seen in that dtype, with
    strides in its elements: a row's gradients take the first half of its bytes, behind
    what the row's program has already read.

    factors[row] is row_max, the final layer's factor, what the target adds,
    teacher_max, the teacher's factor (negative), then m each of layer_max and the
    layers' factors. targets[row] is the target's column or −1. With BUFFERED,
    buffer_columns[row] are k columns (−1: none) whose gradients are
    buffer_gradients[row].
    """
    row = tl.program_id(0).to(tl.int64)
    factors += row * (5 + 2 * m)
    row_max = tl.load(factors)
    factor = tl.load(factors + 1)
    at_target = tl.load(factors + 2)
    teacher_max = tl.load(factors + 3)
    teacher_factor = tl.load(factors + 4)
    target = tl.load(targets + row)
    final += row * stride_final
    final_out += row * stride_final_out
    layers += row * stride_layer_row
    layers_out += row * stride_layer_row_out
    for start in range(0, c, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < c
        z = tl.load(final + column, mask=inside, other=float("-inf"))
        # Every thread has read this block before any overwrites it.
        tl.debug_barrier()
        if SOFTMAX:
            g = factor * tl.exp(z - row_max) + tl.where(column == target, at_target, 0.0)
            tl.store(final_out + column, g, mask=inside)
        if DISTILL:
            if (start < shift + layer_columns) & (start + BLOCK > shift):
                scope = (column >= low) & (column < high)
                real = (column >= shift) & (column < shift + layer_columns)
                teacher = tl.where(scope, teacher_factor * tl.exp(z - teacher_max), 0.0)
                at = layers + (column - shift)
                to = layers_out + (column - shift)
                student = tl.load(at, mask=real, other=float("-inf"))
                for layer in range(m):
                    at += stride_layer
                    # This is another row of memory, which nothing here overwrites.
                    following = tl.load(at, mask=real & (layer + 1 < m), other=float("-inf"))
                    layer_max = tl.load(factors + 5 + layer)
                    layer_factor = tl.load(factors + 5 + m + layer)
                    g = layer_factor * tl.exp(student - layer_max) + teacher
                    g = tl.where(scope, g, 0.0)
                    tl.debug_barrier()
                    tl.store(to, g, mask=real)
                    to += stride_layer_out
                    student = following
    if BUFFERED:
        # What the blocks wrote is overwritten.
        tl.debug_barrier()
        index = tl.arange(0, MAX_K)
        column = tl.load(buffer_columns + row * k + index, mask=index < k, other=-1)
        g = tl.load(buffer_gradients + row * k + index, mask=column >= 0, other=0.0)
        tl.store(final_out + column, g, mask=column >= 0)
