"""Self-hard negatives (METHOD.md §2): threshold-gated top-k, ties to the lower token id."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_largest(row: Tensor, value: Tensor, n: int, k: int, budget: int) -> tuple[Tensor | None, Tensor]:
    """Of entries (row [E] ascending, value [E]; tokens ascending within a row) the k largest of every row.

    Returns (int64 [≤ E], the kept entries, ascending, or None for all of them; bool [n]: rows that had more than k). `budget` bytes bound the temporaries.
    """
    count = torch.bincount(row, minlength=n)
    over = count > k
    crowded = over.nonzero().flatten()
    if not crowded.numel():
        return None, over
    keep = torch.ones_like(row, dtype=torch.bool)
    first = count.cumsum(0) - count
    width = int(count.max())
    offsets = torch.arange(width, device=row.device)
    for part in crowded.split(max(1, budget // (32 * width))):
        listed = offsets < count[part, None]
        entry = first[part, None] + offsets
        values = value.take(entry.clamp(max=row.numel() - 1)).masked_fill_(~listed, -torch.inf)
        keep[entry[listed & ~largest(values, k)]] = False
    return keep.nonzero().flatten(), over


def largest(values: Tensor, k: int) -> Tensor:
    """bool [n, c]: the k largest of each row of values [n, c], ties to the lower column."""
    return largest_and_bound(values, k)[0]


def largest_and_bound(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same with the k-th largest value [n]; −inf where there are no more than k."""
    if values.shape[1] <= k:
        return torch.ones_like(values, dtype=torch.bool), values.new_full((values.shape[0],), -torch.inf)
    bound = values.topk(k, sorted=False).values.amin(1, keepdim=True)
    keep = values > bound
    room = k - keep.sum(1, keepdim=True)
    tied = values == bound
    if bool((tied.sum(1, keepdim=True) > room).any()):
        tied &= tied.cumsum(1, dtype=torch.int32) <= room
    return keep | tied, bound[:, 0]


BLOCK = 32


def dense_candidates(values: Tensor, threshold: Tensor, k: int, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """The up to k largest values [n, c] that reach threshold [n], as (row [E], column [E], value [E]), ascending by (row, column).

    Two passes: the k blocks of columns with the largest maxima hold the k largest values. Where a tie crosses the cut the row is
    redone exactly. `budget` bytes bound the temporaries.
    """
    n, c = values.shape
    whole = c // BLOCK * BLOCK
    blocks = -(-c // BLOCK)
    if blocks <= 2 * k:
        live, maxima = torch.arange(n, device=values.device), None
    else:
        maxima = values[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)
        if whole < c:
            maxima = torch.cat([maxima, values[:, whole:].amax(1, keepdim=True)], 1)
        live = (maxima.amax(1) >= threshold).nonzero().flatten()  # rows without any candidate end here
    parts = []
    for some in live.split(max(1, budget // (24 * min(c + 1, (k + 1) * BLOCK)))):
        row, column, value = _exact(values, threshold, k, some) if maxima is None else _by_blocks(values, maxima, threshold, k, some)
        parts.append((some[row], column, value))
    if not parts:
        return live, live, values.new_zeros(0)
    if len(parts) == 1:
        return parts[0]
    row, column, value = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return row, column, value


def _exact(values: Tensor, threshold: Tensor, k: int, some: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows `some`; the row's place in `some` is returned."""
    values = values if some.numel() == values.shape[0] else values[some]
    keep = largest(values, k) & (values >= threshold[some, None])
    row, column = keep.nonzero(as_tuple=True)
    return row, column, values[row, column]


def _by_blocks(values: Tensor, maxima: Tensor, threshold: Tensor, k: int, some: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c = values.shape[1]
    top = maxima[some].topk(k + 1)
    blocks = top.indices.sort(1).values
    columns = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    absent = columns >= c
    gathered = values[some[:, None], columns.clamp_(max=c - 1)].masked_fill_(absent, -torch.inf)
    keep, cut = largest_and_bound(gathered, k)
    row, position = (keep & (gathered >= threshold[some, None])).nonzero(as_tuple=True)
    column, value = columns[row, position], gathered[row, position]
    # a block left out may hold the cut's value once more, at a lower column
    doubtful = (top.values[:, -1] >= cut) & (cut >= threshold[some])
    if not bool(doubtful.any()):
        return row, column, value
    again = doubtful.nonzero().flatten()
    r, cc, v = _exact(values, threshold, k, some[again])
    sure = ~doubtful[row]
    row, column, value = torch.cat([row[sure], again[r]]), torch.cat([column[sure], cc]), torch.cat([value[sure], v])
    order = torch.argsort(row, stable=True)
    return row[order], column[order], value[order]
