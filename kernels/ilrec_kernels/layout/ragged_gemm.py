"""Logits and their gradients at ragged lists of tokens (the valid_next scope).

The cost is in proportion to the lists. Rows with the same list form a group: one dense
product with the group's rows of the head (at a semantic-ID trie's root every row is in
one group). Groups of about the same shape are padded together and run as one batched
product, so that a thousand short lists are a few calls; a group too large for the
budget is cut into several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.layout.head_gradient import HeadGradient
from ilrec_kernels.layout.segments import add_rows, row_counts, segment_sum


@dataclass(frozen=True)
class Bucket:
    """G groups of up to R rows and L tokens, padded to [G, R] and [G, L].

    rows    int64 [G, R]; n stands for padding
    tokens  int64 [G, L] local columns; padding is some other list's token, because many
            copies of one token would be added one after the other
    """

    rows: Tensor
    tokens: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        groups, rows = self.rows.shape
        return groups, rows, self.tokens.shape[1]


class RaggedGemm:
    """The head at entries (row [P], local column [P]), rows ascending.

    Rows marked in `skip` [n] are left out: logits 0, no gradient. There are S
    streams of d columns; `budget` bytes bound the temporaries. Buckets lie one after
    the other in flat buffers; what goes in or out of these is looked up in one go.
    """

    def __init__(
        self, row: Tensor, column: Tensor, skip: Tensor, streams: int, d: int, budget: int
    ) -> None:
        self.n, self.count = skip.numel(), row.numel()
        buckets = list(_buckets(row, column, skip, streams, d, budget)) if self.count else []
        self.buckets = [bucket for bucket, _ in buckets]
        # The entry at each index of a flat buffer; P stands for padding.
        self.entry_index = torch.cat([row.new_zeros(0), *(entries for _, entries in buckets)])

    def logits(self, hidden: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
        """Return logits [S, P] in `dtype` from hidden [S, n, d] and the rank's head
        rows.
        """
        s, size = hidden.shape[0], self.entry_index.numel()
        # The last element stands for the entries of skipped rows.
        flat = torch.zeros(s, size + 1, dtype=dtype, device=hidden.device)
        for bucket, part in self._parts():
            x, w = self._rows(bucket, hidden, dtype), head[bucket.tokens].to(dtype)
            g, r, t = bucket.shape
            product = torch.bmm(x, w.transpose(1, 2))
            flat[:, part].view(s, g, r, t).copy_(product.view(g, s, r, t).transpose(0, 1))
        index = torch.full((self.count + 1,), size, dtype=torch.int64, device=hidden.device)
        index[self.entry_index] = torch.arange(size, device=hidden.device)
        return torch.stack([stream.take(index[: self.count]) for stream in flat])

    def backward(
        self,
        grad: Sequence[Tensor],
        hidden: Tensor,
        head: Tensor,
        hidden_grad: Tensor,
        head_grad: HeadGradient | None,
    ) -> None:
        """Add the gradients of `logits` to hidden_grad [S, n, d] and head_grad.

        `grad` holds S tensors [P].
        """
        s, n, d = hidden.shape
        zero = grad[0].new_zeros(1)
        flat = torch.stack([torch.cat([stream, zero]).take(self.entry_index) for stream in grad])
        for bucket, part in self._parts():
            g, r, t = bucket.shape
            dz = flat[:, part].view(s, g, r, t).transpose(0, 1).reshape(g, s * r, t)
            dx = torch.bmm(dz, head[bucket.tokens].to(dz.dtype))
            # Padded rows add zeros to some row.
            first_row = n * torch.arange(s, device=bucket.rows.device)[:, None]
            index = self._existing_rows(bucket)[:, None] + first_row
            add_rows(hidden_grad.view(s * n, d), index.flatten(), dx.view(-1, d))
            if head_grad is not None:
                dw = torch.bmm(dz.transpose(1, 2), self._rows(bucket, hidden, dz.dtype))
                head_grad.add(bucket.tokens.flatten(), dw.flatten(0, 1))

    def _parts(self) -> Iterator[tuple[Bucket, slice]]:
        """Yield the buckets and where they lie in a flat buffer."""
        begin = 0
        for bucket in self.buckets:
            end = begin + math.prod(bucket.shape)
            yield bucket, slice(begin, end)
            begin = end

    def _rows(self, bucket: Bucket, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the bucket's rows of hidden [S, n, d] as [G, S·R, d]."""
        (s, _, d), (g, r, _) = hidden.shape, bucket.shape
        x = hidden.index_select(1, self._existing_rows(bucket).flatten()).view(s, g, r, d)
        return x.transpose(0, 1).to(dtype).reshape(g, s * r, d)

    def _existing_rows(self, bucket: Bucket) -> Tensor:
        """Return the rows [G, R] with some existing row in place of the padding."""
        padding_row = torch.arange(bucket.rows.numel(), device=bucket.rows.device) % self.n
        return torch.where(bucket.rows < self.n, bucket.rows, padding_row.view_as(bucket.rows))


def _buckets(
    row: Tensor, column: Tensor, skip: Tensor, streams: int, d: int, budget: int
) -> Iterator[tuple[Bucket, Tensor]]:
    """Group rows by identical list, bucket groups by shape, cut what exceeds the
    budget.

    With each bucket come its entries, flat over [G, R, L]; P stands for padding.
    """
    device, n = row.device, skip.numel()
    length = row_counts(row, n)
    first = length.cumsum(0) - length
    group = _group_ids(row, column, length, first)
    used = ((length > 0) & ~skip).nonzero().flatten()
    rows_by_group = used[torch.argsort(group[used], stable=True)]
    members = torch.bincount(group[used])
    begin = members.cumsum(0) - members
    begin, members = begin[members > 0], members[members > 0]
    tokens = length[rows_by_group[begin]]
    shape = _ceil_log2(members) * 64 + _ceil_log2(tokens)
    # Bytes: two copies of the hidden rows, of the head's rows, of the logits.
    per_row, per_token, per_entry = 8 * streams * d, 12 * d, 8 * streams + 24
    for key in torch.unique(shape).tolist():
        same_shape = (shape == key).nonzero().flatten()
        max_rows, max_tokens = int(members[same_shape].max()), int(tokens[same_shape].max())
        cut_tokens = max(1, min(max_tokens, budget // 3 // per_token))
        cut_rows = max(
            1,
            min(max_rows, (budget - cut_tokens * per_token) // (per_row + cut_tokens * per_entry)),
        )
        groups = 1
        if (cut_tokens, cut_rows) == (max_tokens, max_rows):
            group_bytes = (
                max_rows * per_row + max_tokens * per_token + max_rows * max_tokens * per_entry
            )
            groups = max(1, budget // group_bytes)
        for part in torch.split(same_shape, groups):
            first_row = rows_by_group[begin[part]]
            for i, j in itertools.product(
                range(0, max_rows, cut_rows), range(0, max_tokens, cut_tokens)
            ):
                offsets = torch.arange(i, min(i + cut_rows, max_rows), device=device)
                is_row = offsets < members[part, None]
                index = (begin[part, None] + offsets).clamp(max=rows_by_group.numel() - 1)
                rows = rows_by_group[index].masked_fill(~is_row, n)
                offsets = torch.arange(j, min(j + cut_tokens, max_tokens), device=device)
                is_token = offsets < tokens[part, None]
                columns = column[(first[first_row, None] + offsets) % column.numel()]
                entries = first[rows.clamp(max=n - 1)][:, :, None] + offsets
                entries.masked_fill_(~(is_row[:, :, None] & is_token[:, None, :]), row.numel())
                yield Bucket(rows, columns), entries.flatten()


def _group_ids(row: Tensor, column: Tensor, length: Tensor, first: Tensor) -> Tensor:
    """Return ids [n] that are equal only for rows whose lists are equal.

    A 62-bit hash finds equal lists; a comparison
    with the group's first row confirms it.
    """
    n, device = length.numel(), row.device
    distinct = int(column.max()) + 1
    if distinct > column.numel():
        mixed = _mix(column)
    else:
        mixed = _mix(torch.arange(distinct, device=device)).take(column)
    key = segment_sum(mixed, row, n) * 1024 + length
    group: Tensor = torch.unique(key, return_inverse=True)[1]
    first_rows = torch.full((int(group.max()) + 1,), n, dtype=torch.int64, device=device)
    first_rows.scatter_reduce_(0, group, torch.arange(n, device=device), "amin")
    first_row = first_rows.take(group)
    if bool((length.take(first_row) == length).all()):
        index = (first.take(first_row) - first).take(row)
        index.add_(torch.arange(row.numel(), device=device))
        if torch.equal(column.take(index), column):
            return group
    # After a collision of hashes no row shares its list, which is slower and still right.
    return torch.arange(n, device=device)


def _mix(x: Tensor) -> Tensor:
    """Spread token ids over int64 by wrapping products with splitmix64's constants."""
    x = (x + 1) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    return x ^ (x >> 27)


def _ceil_log2(x: Tensor) -> Tensor:
    exponent: Tensor = torch.ceil(torch.log2(x.double())).long()
    return exponent
