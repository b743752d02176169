"""The Triton kernel of regime V: logits of a tile of rows and columns are made, reduced to statistics and forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ilrec_kernels.problem import SPLIT


@dataclass(frozen=True)
class Config:
    """Rows, columns and depth of a tile, and how it runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# by element type of rows and head; tests compile exactly these
CONFIGS = {torch.bfloat16: Config(64, 128, 32, 8, 3), torch.float32: Config(64, 32, 32, 8, 2)}
ALIGNMENT = 16  # d is a multiple of this, so that rows are read in wide loads

# statistics of a split, in this order, each [n]: then three a layer (layer_top, layer_rest, cross)
Z_TARGET, TOP, REST, TEACHER_TOP, TEACHER_REST, PER_LAYER = 0, 1, 2, 3, 4, 5


@triton.jit
def tile_logits(x, w, rows, columns, n, c, d, stride_x, stride_w, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """[ROWS, COLUMNS] fp32 of x · wᵀ."""
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, d, DEPTH):
        depth = k + tl.arange(0, DEPTH)
        a = tl.load(x + rows[:, None].to(tl.int64) * stride_x + depth[None, :], mask=(rows[:, None] < n) & (depth[None, :] < d), other=0.0)
        b = tl.load(w + columns[None, :].to(tl.int64) * stride_w + depth[:, None], mask=(columns[None, :] < c) & (depth[:, None] < d), other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["n", "c", "low", "high", "m", "stride_split"])  # one form for all sizes: those for particular ones spill
def forward_kernel(
    x, w, targets, out, n, c, d, low, high, m, stride_stream, stride_x, stride_w, stride_split,
    DISTILL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Statistics of ROWS rows over the columns of one split; `out` [splits, 5 + 3m, n] holds −inf and 0 before, and is this program's alone."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < n
    split = tl.program_id(1)
    out += split.to(tl.int64) * stride_split
    target = tl.load(targets + rows, mask=real, other=-1)
    z_target = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    rest = tl.zeros([ROWS], tl.float32)
    teacher_top = tl.full([ROWS], float("-inf"), tl.float32)
    teacher_rest = tl.zeros([ROWS], tl.float32)
    for start in range(split * WIDTH, tl.minimum(split * WIDTH + WIDTH, c), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        z = tile_logits(x, w, rows, columns, n, c, d, stride_x, stride_w, ROWS, COLUMNS, DEPTH)
        z = tl.where(columns[None, :] < c, z, float("-inf"))
        z_target += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        highest = tl.maximum(top, tl.max(z, 1))
        rest = rest * tl.exp(top - highest) + tl.sum(tl.exp(z - highest[:, None]), 1)
        top = highest
        if DISTILL:
            if (start < high) & (start + COLUMNS > low):
                scope = (columns >= low) & (columns < high)
                highest = tl.maximum(teacher_top, tl.max(tl.where(scope[None, :], z, float("-inf")), 1))
                shrink = tl.exp(teacher_top - highest)
                weight = tl.where(scope[None, :], tl.exp(z - highest[:, None]), 0.0)
                teacher_rest = teacher_rest * shrink + tl.sum(weight, 1)
                teacher_top = highest
                source = x
                place = out + 5 * n + rows
                for _ in range(0, m):
                    source += stride_stream
                    student = tile_logits(source, w, rows, columns, n, c, d, stride_x, stride_w, ROWS, COLUMNS, DEPTH)
                    layer_top = tl.load(place, mask=real, other=0.0)
                    layer_rest = tl.load(place + n, mask=real, other=0.0)
                    cross = tl.load(place + 2 * n, mask=real, other=0.0)
                    gap = tl.where(scope[None, :], z - student, 0.0)
                    cross = cross * shrink + tl.sum(weight * gap, 1)
                    student = tl.where(scope[None, :], student, float("-inf"))
                    layer_highest = tl.maximum(layer_top, tl.max(student, 1))
                    layer_rest = layer_rest * tl.exp(layer_top - layer_highest) + tl.sum(tl.exp(student - layer_highest[:, None]), 1)
                    tl.store(place, layer_highest, mask=real)
                    tl.store(place + n, layer_rest, mask=real)
                    tl.store(place + 2 * n, cross, mask=real)
                    place += 3 * n
    tl.store(out + rows, z_target, mask=real)
    tl.store(out + n + rows, top, mask=real)
    tl.store(out + 2 * n + rows, rest, mask=real)
    tl.store(out + 3 * n + rows, teacher_top, mask=real)
    tl.store(out + 4 * n + rows, teacher_rest, mask=real)


def forward(x: Tensor, weight: Tensor, targets: Tensor, distill: tuple[int, int] | None) -> Tensor:
    """[splits, 5 + 3m, n] fp32 from x [S, n, d] and weight [c, d] of one dtype; targets are columns, −1 where not here."""
    s, n, d = x.shape
    c = weight.shape[0]
    m = s - 1 if distill is not None else 0
    splits = -(-c // SPLIT)
    out = torch.zeros(splits, PER_LAYER + 3 * m, n, dtype=torch.float32, device=x.device)
    out[:, PER_LAYER::3] = -torch.inf
    if n and c:
        config = CONFIGS[x.dtype]
        low, high = distill if distill is not None else (0, 0)
        forward_kernel[(-(-n // config.rows), splits)](
            x, weight, targets, out, n, c, d, low, high, m, x.stride(0), x.stride(1), weight.stride(0), out.stride(0),
            DISTILL=distill is not None, WIDTH=SPLIT, ROWS=config.rows, COLUMNS=config.columns, DEPTH=config.depth,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out
