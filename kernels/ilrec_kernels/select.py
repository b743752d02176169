"""Self-hard negatives (METHOD.md §2): threshold-gated top-k, ties to the lower token id."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_largest(row: Tensor, value: Tensor, n: int, k: int, budget: int) -> tuple[Tensor, Tensor]:
    """Of entries (row [E] ascending, value [E]; tokens ascending within a row) the k largest of every row.

    Returns (bool [E], bool [n]: rows that had more than k). `budget` bytes bound the temporaries.
    """
    count = torch.bincount(row, minlength=n)
    over = count > k
    keep = torch.ones_like(row, dtype=torch.bool)
    crowded = over.nonzero().flatten()
    if not crowded.numel():
        return keep, over
    first = count.cumsum(0) - count
    width = int(count.max())
    offsets = torch.arange(width, device=row.device)
    for part in crowded.split(max(1, budget // (32 * width))):
        listed = offsets < count[part, None]
        entry = (first[part, None] + offsets).masked_fill_(~listed, 0)
        values = value.take(entry).masked_fill_(~listed, -torch.inf)
        keep[entry[listed]] = largest(values, k)[listed]
    return keep, over


def largest(values: Tensor, k: int) -> Tensor:
    """bool [n, c]: the k largest of each row of values [n, c], ties to the lower column."""
    if values.shape[1] <= k:
        return torch.ones_like(values, dtype=torch.bool)
    bound = values.topk(k).values[:, -1:]
    keep = values > bound
    tied = values == bound
    return keep | (tied & (tied.cumsum(1) <= k - keep.sum(1, keepdim=True)))


BLOCK = 32


def dense_candidates(values: Tensor, threshold: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The up to k largest values [n, c] that reach threshold [n], as (row [E], column [E], value [E]), ascending by (row, column).

    Two passes: the k blocks of columns with the largest maxima hold the k largest values. Where a tie crosses the cut the row is
    redone exactly.
    """
    n, c = values.shape
    if c <= k or c < 8 * BLOCK:
        return _exact(values, threshold, k)
    whole = c // BLOCK * BLOCK
    maxima = values[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)
    if whole < c:
        maxima = torch.cat([maxima, values[:, whole:].amax(1, keepdim=True)], 1)
    live = (maxima.amax(1) >= threshold).nonzero().flatten()  # rows without any candidate end here
    if not live.numel():
        empty = live.new_zeros(0)
        return empty, empty, values.new_zeros(0)
    maxima = maxima[live]
    if maxima.shape[1] <= k + 1 or live.numel() * 4 > n * 3 and c < 64 * BLOCK:
        row, column, value = _exact(values if live.numel() == n else values[live], threshold[live], k)
        return live[row], column, value
    top = maxima.topk(k + 1)
    blocks = top.indices.sort(1).values
    columns = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    absent = columns >= c
    gathered = values[live[:, None], columns.clamp_(max=c - 1)].masked_fill_(absent, -torch.inf)
    keep = largest(gathered, k) & (gathered >= threshold[live, None])
    row, position = keep.nonzero(as_tuple=True)
    column, value = columns[row, position], gathered[row, position]
    # a block left out may hold the cut's value once more, at a lower column
    cut = gathered.topk(k).values[:, -1]
    doubtful = (top.values[:, -1] >= cut) & (cut >= threshold[live])
    if not bool(doubtful.any()):
        return live[row], column, value
    again = live[doubtful]
    r, cc, v = _exact(values[again], threshold[again], k)
    sure = ~doubtful[row]
    row, column, value = torch.cat([live[row[sure]], again[r]]), torch.cat([column[sure], cc]), torch.cat([value[sure], v])
    order = torch.argsort(row, stable=True)
    return row[order], column[order], value[order]


def _exact(values: Tensor, threshold: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    keep = largest(values, k) & (values >= threshold[:, None])
    row, column = keep.nonzero(as_tuple=True)
    return row, column, values[row, column]
