"""The k largest of every row, with ties to the lower token id (METHOD.md §2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ilrec_kernels.layout.segments import row_counts

# Columns whose maximum is compared with the threshold before they are looked into.
BLOCK = 32

# Row, column and value [E] each, ascending by (row, column).
Entries = tuple[Tensor, Tensor, Tensor]


def keep_largest(
    row: Tensor, value: Tensor, n: int, k: int, budget: int
) -> tuple[Tensor | None, Tensor]:
    """Keep the k largest entries of every row.

    Rows [E] ascend, and within a row the tokens. Returns (the kept entries, int64 and
    ascending, or None for all of them; bool [n]: rows that had more than k). `budget`
    bytes bound the temporaries.
    """
    count = row_counts(row, n)
    capped = count > k
    crowded = capped.nonzero().flatten()
    if not crowded.numel():
        return None, capped
    keep = torch.ones_like(row, dtype=torch.bool)
    first = count.cumsum(0) - count
    width = int(count.max())
    offsets = torch.arange(width, device=row.device)
    for part in torch.split(crowded, max(1, budget // (32 * width))):
        exists = offsets < count[part, None]
        entry = first[part, None] + offsets
        values = value.take(entry.clamp(max=row.numel() - 1)).masked_fill_(~exists, -torch.inf)
        keep[entry[exists & ~largest(values, k)]] = False
    return keep.nonzero().flatten(), capped


def draw_entries(row: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """Draw counts [n] entries of every row from the eligible ones, bool [P].

    Rows [P] ascend. Returns the entries, int64
    and ascending; torch's generator draws them.
    """
    entry = eligible.nonzero().flatten()
    of = row.take(entry)
    draws = torch.rand(entry.shape, dtype=torch.float64, device=row.device)
    # Within a row the entries are now in a random order.
    order = torch.argsort(of + draws)
    present = row_counts(of, counts.numel())
    number = torch.arange(entry.numel(), device=row.device) - (present.cumsum(0) - present).take(of)
    return entry.take(order[number < counts.take(of)]).sort().values


def largest(values: Tensor, k: int) -> Tensor:
    """Return where the k largest of each row of values [n, c] are, bool [n, c].

    Ties go to the lower column.
    """
    return largest_and_kth_value(values, k)[0]


def largest_and_kth_value(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the same, with the k-th largest
    value [n]; −inf where there are at most k.
    """
    if values.shape[1] <= k:
        kth_value = values.new_full((values.shape[0],), -torch.inf)
        return torch.ones_like(values, dtype=torch.bool), kth_value
    kth_value = values.topk(k, sorted=False).values.amin(1, keepdim=True)
    keep = values > kth_value
    room = k - keep.sum(1, keepdim=True)
    tied = values == kth_value
    if bool((tied.sum(1, keepdim=True) > room).any()):
        tied &= tied.cumsum(1, dtype=torch.int32) <= room
    return keep | tied, kth_value[:, 0]


def dense_candidates(values: Tensor, threshold: Tensor, k: int, budget: int) -> Entries:
    """Return the up to k largest values [n, c] of each row that reach threshold [n].

    They are (row [E], column [E], value [E]), ascending by (row, column). Blocks of
    columns whose maximum does not reach the threshold are not looked into. Of rows with
    many that do, the k blocks with the largest maxima hold the k largest values; where
    a tie crosses the cut the row is redone exactly. `budget` bytes bound the
    temporaries.
    """
    n, c = values.shape
    if -(-c // BLOCK) <= 2 * k:
        return _in_parts(
            torch.arange(n, device=values.device),
            budget // (24 * (c + 1)),
            lambda rows: _exact(values, threshold, k, rows),
        )
    whole = c // BLOCK * BLOCK
    maxima = torch.unflatten(values[:, :whole], 1, (-1, BLOCK)).amax(2)
    if whole < c:
        maxima = torch.cat([maxima, values[:, whole:].amax(1, keepdim=True)], 1)
    reached = maxima >= threshold[:, None]
    count = reached.sum(1)
    crowded = count > 2 * k
    few = ((count > 0) & ~crowded).nonzero().flatten()
    many = crowded.nonzero().flatten()
    of_few = _in_parts(
        few,
        budget // (48 * BLOCK * k),
        lambda rows: _few_blocks(values, reached, threshold, k, rows, budget),
    )
    if not many.numel():
        return of_few
    of_many = _in_parts(
        many,
        budget // (24 * (k + 1) * BLOCK),
        lambda rows: _by_blocks(values, maxima, threshold, k, rows),
    )
    return of_many if not few.numel() else _by_row(of_few, of_many)


def _by_row(first: Entries, second: Entries) -> Entries:
    """Join entries of different rows, ascending by row."""
    row, column, value = (torch.cat(pair) for pair in zip(first, second, strict=True))
    order = torch.argsort(row, stable=True)
    return row[order], column[order], value[order]


def _in_parts(rows: Tensor, step: int, find: Callable[[Tensor], Entries]) -> Entries:
    """Join what `find` returns for `step` of the rows at a time.

    `find` returns rows as positions within those it was given.
    """
    parts = []
    for part in torch.split(rows, max(1, step)):
        row, column, value = find(part)
        parts.append((part[row], column, value))
    if len(parts) == 1:
        return parts[0]
    row, column, value = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return row, column, value


def _few_blocks(
    values: Tensor, reached: Tensor, threshold: Tensor, k: int, rows: Tensor, budget: int
) -> Entries:
    """Look into the blocks that reach the threshold alone, up to 2k of them a row."""
    c = values.shape[1]
    row, block = reached[rows].nonzero(as_tuple=True)
    column = block[:, None] * BLOCK + torch.arange(BLOCK, device=values.device)
    gathered = values.take(rows[row, None] * c + column.clamp(max=c - 1))
    passed = (gathered >= threshold[rows[row], None]) & (column < c)
    entry, position = passed.nonzero(as_tuple=True)
    row, column, value = row[entry], column[entry, position], gathered[entry, position]
    keep, _ = keep_largest(row, value, rows.numel(), k, budget)
    return (row, column, value) if keep is None else (row[keep], column[keep], value[keep])


def _exact(values: Tensor, threshold: Tensor, k: int, rows: Tensor) -> Entries:
    """Look at every column of the rows."""
    values = values if rows.numel() == values.shape[0] else values[rows]
    keep = largest(values, k) & (values >= threshold[rows, None])
    row, column = keep.nonzero(as_tuple=True)
    return row, column, values[row, column]


def _by_blocks(values: Tensor, maxima: Tensor, threshold: Tensor, k: int, rows: Tensor) -> Entries:
    """Look into the k + 1 blocks with the largest maxima."""
    c = values.shape[1]
    largest_maxima = maxima[rows].topk(k + 1)
    blocks = largest_maxima.indices.sort(1).values
    columns = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    absent = columns >= c
    gathered = values[rows[:, None], columns.clamp_(max=c - 1)].masked_fill_(absent, -torch.inf)
    keep, kth_value = largest_and_kth_value(gathered, k)
    row, position = (keep & (gathered >= threshold[rows, None])).nonzero(as_tuple=True)
    column, value = columns[row, position], gathered[row, position]
    # A block left out may hold the k-th value once more, at a lower column.
    doubtful = (largest_maxima.values[:, -1] >= kth_value) & (kth_value >= threshold[rows])
    if not bool(doubtful.any()):
        return row, column, value
    again = doubtful.nonzero().flatten()
    redone = _exact(values, threshold, k, rows[again])
    sure = ~doubtful[row]
    return _by_row((row[sure], column[sure], value[sure]), (again[redone[0]], redone[1], redone[2]))
