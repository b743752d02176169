"""Self-hard negatives (METHOD.md §2): threshold-gated top-k, ties to the lower token id."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ilrec_kernels.segments import row_counts


def keep_largest(
    row: Tensor, value: Tensor, n: int, k: int, budget: int
) -> tuple[Tensor | None, Tensor]:
    """Of entries (row [E] ascending, value [E]; tokens ascending within a row) the k largest of every row.

    Returns (int64 [≤ E], the kept entries, ascending, or None for all of them; bool [n]: rows that had more than k). `budget` bytes bound the temporaries.
    """
    count = row_counts(row, n)
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
        return torch.ones_like(values, dtype=torch.bool), values.new_full(
            (values.shape[0],), -torch.inf
        )
    bound = values.topk(k, sorted=False).values.amin(1, keepdim=True)
    keep = values > bound
    room = k - keep.sum(1, keepdim=True)
    tied = values == bound
    if bool((tied.sum(1, keepdim=True) > room).any()):
        tied &= tied.cumsum(1, dtype=torch.int32) <= room
    return keep | tied, bound[:, 0]


BLOCK = 32


def dense_candidates(
    values: Tensor, threshold: Tensor, k: int, budget: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The up to k largest values [n, c] that reach threshold [n], as (row [E], column [E], value [E]), ascending by (row, column).

    Blocks of columns whose maximum does not reach the threshold are never looked into again. Of rows with many that do, the k blocks with the
    largest maxima hold the k largest values; where a tie crosses the cut the row is redone exactly. `budget` bytes bound the temporaries.
    """
    n, c = values.shape
    whole = c // BLOCK * BLOCK
    if -(-c // BLOCK) <= 2 * k:
        return _in_parts(
            torch.arange(n, device=values.device),
            budget // (24 * (c + 1)),
            lambda some: _exact(values, threshold, k, some),
        )
    maxima = values[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)
    if whole < c:
        maxima = torch.cat([maxima, values[:, whole:].amax(1, keepdim=True)], 1)
    reached = maxima >= threshold[:, None]
    count = reached.sum(1)
    crowded = count > 2 * k
    few = ((count > 0) & ~crowded).nonzero().flatten()
    many = crowded.nonzero().flatten()
    row, column, value = _in_parts(
        few,
        budget // (48 * BLOCK * k),
        lambda some: _few_blocks(values, reached, threshold, k, some, budget),
    )
    if not many.numel():
        return row, column, value
    r, cc, v = _in_parts(
        many,
        budget // (24 * (k + 1) * BLOCK),
        lambda some: _by_blocks(values, maxima, threshold, k, some),
    )
    if not few.numel():
        return r, cc, v
    row, column, value = torch.cat([row, r]), torch.cat([column, cc]), torch.cat([value, v])
    order = torch.argsort(row, stable=True)
    return row[order], column[order], value[order]


Entries = tuple[Tensor, Tensor, Tensor]


def _in_parts(rows: Tensor, step: int, find: Callable[[Tensor], Entries]) -> Entries:
    """What `find` gives for `step` of the rows at a time; its rows are places in what it is given."""
    parts = []
    for some in rows.split(max(1, step)):
        row, column, value = find(some)
        parts.append((some[row], column, value))
    if len(parts) == 1:
        return parts[0]
    row, column, value = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return row, column, value


def _few_blocks(
    values: Tensor, reached: Tensor, threshold: Tensor, k: int, some: Tensor, budget: int
) -> Entries:
    """Of the rows `some`, each with up to 2k blocks that reach the threshold: only those blocks are gathered."""
    c = values.shape[1]
    row, block = reached[some].nonzero(as_tuple=True)
    column = block[:, None] * BLOCK + torch.arange(BLOCK, device=values.device)
    found = values.take(some[row, None] * c + column.clamp(max=c - 1))
    entry, place = ((found >= threshold[some[row], None]) & (column < c)).nonzero(as_tuple=True)
    row, column, value = row[entry], column[entry, place], found[entry, place]
    keep, _ = keep_largest(row, value, some.numel(), k, budget)
    return (row, column, value) if keep is None else (row[keep], column[keep], value[keep])


def _exact(values: Tensor, threshold: Tensor, k: int, some: Tensor) -> Entries:
    """Of the rows `some`; the row's place in `some` is returned."""
    values = values if some.numel() == values.shape[0] else values[some]
    keep = largest(values, k) & (values >= threshold[some, None])
    row, column = keep.nonzero(as_tuple=True)
    return row, column, values[row, column]


def _by_blocks(values: Tensor, maxima: Tensor, threshold: Tensor, k: int, some: Tensor) -> Entries:
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
    row, column, value = (
        torch.cat([row[sure], again[r]]),
        torch.cat([column[sure], cc]),
        torch.cat([value[sure], v]),
    )
    order = torch.argsort(row, stable=True)
    return row[order], column[order], value[order]
