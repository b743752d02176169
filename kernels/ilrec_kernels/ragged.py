"""Logits and their gradients at ragged lists of tokens (the valid_next scope), at a cost in proportion to the lists.

Rows with the same list form a group: one dense product with the group's rows of the head (at a semantic-ID trie's root every row is in one
group). Groups of about the same shape are padded together and run as one batched product, so that a thousand short lists are a few calls; a
group too large for the budget is cut into several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.segments import add_rows, row_counts, segment_sum


@dataclass(frozen=True)
class Bucket:
    """G groups of up to R rows and L tokens."""

    rows: Tensor  # int64 [G, R]; n where there is none
    tokens: Tensor  # int64 [G, L] local columns; where there is none, some other list's: many of one would be added one after the other

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.rows.shape, self.tokens.shape[1])  # type: ignore[return-value]


class RaggedHead:
    """The head at pairs (row [P], local column [P]), rows ascending.

    Rows marked in `skip` [n] are left out: logits 0, no gradient. There are S streams of d columns; `budget` bytes bound the temporaries.
    Buckets lie one after the other in flat buffers; what goes in or out of these is looked up in one go.
    """

    def __init__(
        self, row: Tensor, column: Tensor, skip: Tensor, streams: int, d: int, budget: int
    ) -> None:
        self.n, self.count = skip.numel(), row.numel()
        found = list(_buckets(row, column, skip, streams, d, budget)) if self.count else []
        self.buckets = [bucket for bucket, _ in found]
        self.pairs = torch.cat(
            [row.new_zeros(0), *(pairs for _, pairs in found)]
        )  # [Q] the pair at each place of a flat buffer

    def logits(self, hidden: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
        """[S, P] in `dtype`, from hidden [S, n, d] and the rank's head rows."""
        s = hidden.shape[0]
        flat = torch.zeros(
            s, self.pairs.numel() + 1, dtype=dtype, device=hidden.device
        )  # the last place is a skipped pair's
        for b, places in self._places():
            x, w = self._rows(b, hidden, dtype), head[b.tokens].to(dtype)
            g, r, t = b.shape
            flat[:, places].view(s, g, r, t).copy_(
                torch.bmm(x, w.transpose(1, 2)).view(g, s, r, t).transpose(0, 1)
            )
        place = torch.full(
            (self.count + 1,), self.pairs.numel(), dtype=torch.int64, device=hidden.device
        )
        place[self.pairs] = torch.arange(self.pairs.numel(), device=hidden.device)
        return torch.stack([stream.take(place[: self.count]) for stream in flat])

    def backward(
        self,
        grad: Sequence[Tensor],
        hidden: Tensor,
        head: Tensor,
        hidden_grad: Tensor | None,
        head_grad: Tensor | None,
    ) -> None:
        """Add the gradients of `logits` to hidden_grad [S, n, d] and head_grad [V_local, d], given S times grad [P]."""
        s, n, d = hidden.shape
        zero = grad[0].new_zeros(1)
        flat = torch.stack([torch.cat([stream, zero]).take(self.pairs) for stream in grad])
        for b, places in self._places():
            g, r, t = b.shape
            dz = flat[:, places].view(s, g, r, t).transpose(0, 1).reshape(g, s * r, t)
            if hidden_grad is not None:
                part = torch.bmm(dz, head[b.tokens].to(dz.dtype))
                index = (
                    self._filled(b)[:, None] + n * torch.arange(s, device=b.rows.device)[:, None]
                )  # padding adds zeros
                add_rows(hidden_grad.view(s * n, d), index.flatten(), part.view(-1, d))
            if head_grad is not None:
                dw = torch.bmm(dz.transpose(1, 2), self._rows(b, hidden, dz.dtype))
                add_rows(head_grad, b.tokens.flatten(), dw.flatten(0, 1))

    def _places(self) -> Iterator[tuple[Bucket, slice]]:
        """The buckets and where they lie in a flat buffer."""
        begin = 0
        for b in self.buckets:
            end = begin + math.prod(b.shape)
            yield b, slice(begin, end)
            begin = end

    def _rows(self, b: Bucket, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """[G, S·R, d] of hidden [S, n, d]."""
        (s, _, d), (g, r, _) = hidden.shape, b.shape
        return (
            hidden.index_select(1, self._filled(b).flatten())
            .view(s, g, r, d)
            .transpose(0, 1)
            .to(dtype)
            .reshape(g, s * r, d)
        )

    def _filled(self, b: Bucket) -> Tensor:
        """[G, R] rows, with any in place of those that are not there."""
        return torch.where(
            b.rows < self.n,
            b.rows,
            torch.arange(b.rows.numel(), device=b.rows.device).view_as(b.rows) % self.n,
        )


def _buckets(
    row: Tensor, column: Tensor, skip: Tensor, streams: int, d: int, budget: int
) -> Iterator[tuple[Bucket, Tensor]]:
    """Group rows by identical list, bucket groups by shape, and cut what exceeds the budget; with each bucket its pairs, flat over [G, R, L]: P where
    there is none."""
    device, n = row.device, skip.numel()
    length = row_counts(row, n)
    first = length.cumsum(0) - length
    group = _group_ids(row, column, length, first)
    used = ((length > 0) & ~skip).nonzero().flatten()
    order = used[torch.argsort(group[used], stable=True)]  # rows by group
    members = torch.bincount(group[used])
    begin = members.cumsum(0) - members
    begin, members = begin[members > 0], members[members > 0]
    tokens = length[order[begin]]
    shape = _log2(members) * 64 + _log2(tokens)
    per_row, per_token, per_pair = (
        8 * streams * d,
        12 * d,
        8 * streams + 24,
    )  # bytes: two copies of the hidden rows, of the head's, of the logits
    for key in torch.unique(shape).tolist():
        chosen = (shape == key).nonzero().flatten()
        most, longest = int(members[chosen].max()), int(tokens[chosen].max())
        wide = max(1, min(longest, budget // 3 // per_token))
        high = max(1, min(most, (budget - wide * per_token) // (per_row + wide * per_pair)))
        step = (
            max(1, budget // (most * per_row + longest * per_token + most * longest * per_pair))
            if (wide, high) == (longest, most)
            else 1
        )
        for part in chosen.split(step):
            leader = order[begin[part]]
            for i, j in itertools.product(range(0, most, high), range(0, longest, wide)):
                offsets = torch.arange(i, min(i + high, most), device=device)
                present = offsets < members[part, None]
                rows = order[
                    (begin[part, None] + offsets).clamp(max=order.numel() - 1)
                ].masked_fill(~present, n)
                offsets = torch.arange(j, min(j + wide, longest), device=device)
                listed = offsets < tokens[part, None]
                listed_tokens = column[(first[leader, None] + offsets) % column.numel()]
                base = first[rows.clamp(max=n - 1)]
                pairs = (base[:, :, None] + offsets).masked_fill_(
                    ~(present[:, :, None] & listed[:, None, :]), row.numel()
                )
                yield Bucket(rows, listed_tokens), pairs.flatten()


def _group_ids(row: Tensor, column: Tensor, length: Tensor, first: Tensor) -> Tensor:
    """[n] ids, equal only for rows whose lists are equal: a 62-bit hash finds them, a comparison with the group's first row confirms."""
    n = length.numel()
    distinct = int(column.max()) + 1
    mixed = (
        _mix(column)
        if distinct > column.numel()
        else _mix(torch.arange(distinct, device=column.device)).take(column)
    )
    key = segment_sum(mixed, row, n) * 1024 + length
    _, group = torch.unique(key, return_inverse=True)
    leader = torch.full((int(group.max()) + 1,), n, dtype=torch.int64, device=row.device)
    leader.scatter_reduce_(0, group, torch.arange(n, device=row.device), "amin")
    lead = leader.take(group)
    if bool((length.take(lead) == length).all()):
        place = (
            (first.take(lead) - first).take(row).add_(torch.arange(row.numel(), device=row.device))
        )
        if torch.equal(column.take(place), column):
            return group
    return torch.arange(n, device=row.device)  # a collision: no sharing, still right


def _mix(x: Tensor) -> Tensor:
    """Spread token ids over int64 (wrap-around multiplication, splitmix64's constants)."""
    x = (x + 1) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    return x ^ (x >> 27)


def _log2(x: Tensor) -> Tensor:
    """Ceiling of log2, for x ≥ 1."""
    return torch.ceil(torch.log2(x.double())).long()
