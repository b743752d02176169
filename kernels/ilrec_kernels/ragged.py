"""Logits and their gradients at ragged lists of tokens (the valid_next scope), at a cost in proportion to the lists.

Rows with the same list form a group: one dense product with the group's rows of the head (at a semantic-ID trie's root every row is in one
group). Groups of about the same shape are padded together and run as one batched product, so that a thousand short lists are a few calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.segments import add_rows, segment_sum


@dataclass(frozen=True)
class Bucket:
    """G groups of up to R rows and L tokens."""

    rows: Tensor  # int64 [G, R]; n where there is none
    tokens: Tensor  # int64 [G, L] local columns; 0 where there is none
    pairs: Tensor  # int64 [G, R, L] index of the pair; P where there is none


class RaggedHead:
    """The head at pairs (row [P], local column [P]), rows ascending.

    Rows marked in `skip` [n] are left out: logits 0, no gradient. `width` is S·d; `budget` bytes bound the temporaries.
    Buckets lie one after the other in flat buffers; what goes in or out of these is looked up in one go.
    """

    def __init__(self, row: Tensor, column: Tensor, skip: Tensor, width: int, budget: int) -> None:
        self.n, self.count = skip.numel(), row.numel()
        self.buckets = list(_buckets(row, column, skip, width, budget)) if self.count else []
        none = row.new_zeros(0)
        self.pairs = torch.cat([none, *(b.pairs.flatten() for b in self.buckets)])  # [Q] the pair at each place of a flat buffer
        self.rows = torch.cat([none, *(b.rows.flatten() for b in self.buckets)])

    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """[S, P] in hidden's dtype, from hidden [S, n, d] and the rank's head rows."""
        s, _, d = hidden.shape
        flat, begin = hidden.new_zeros(s, self.pairs.numel() + 1), 0  # the last place is a skipped pair's
        for b in self.buckets:
            x, w = self._rows(b, hidden), head[b.tokens].to(hidden.dtype)
            z = torch.bmm(x, w.transpose(1, 2)).view(len(x), s, -1, w.shape[1])
            flat[:, begin : begin + b.pairs.numel()].view(s, *b.pairs.shape).copy_(z.transpose(0, 1))
            begin += b.pairs.numel()
        place = _inverse(self.pairs, self.count)
        return torch.stack([stream.take(place) for stream in flat])

    def backward(self, grad: Tensor, hidden: Tensor, head: Tensor, hidden_grad: Tensor | None, head_grad: Tensor | None) -> None:
        """Add the gradients of `logits` to hidden_grad [S, n, d] and head_grad [V_local, d], given grad [S, P]."""
        s, _, d = hidden.shape
        zero = grad.new_zeros(1)
        flat = torch.stack([torch.cat([stream, zero]).take(self.pairs) for stream in grad])
        dx, begin, top = grad.new_zeros(s, self.rows.numel() + 1, d), 0, 0
        for b in self.buckets:
            g, r = b.rows.shape
            dz = flat[:, begin : begin + b.pairs.numel()].view(s, *b.pairs.shape).transpose(0, 1).reshape(g, s * r, -1)
            if hidden_grad is not None:
                part = torch.bmm(dz, head[b.tokens].to(grad.dtype)).view(g, s, r, d)
                dx[:, top : top + g * r].view(s, g, r, d).copy_(part.transpose(0, 1))
            if head_grad is not None:
                dw = torch.bmm(dz.transpose(1, 2), self._rows(b, hidden))
                add_rows(head_grad, b.tokens.flatten(), dw.flatten(0, 1))  # padding adds zeros to row 0
            begin, top = begin + b.pairs.numel(), top + g * r
        if hidden_grad is not None:
            hidden_grad += dx.index_select(1, _inverse(self.rows, self.n))

    def _rows(self, b: Bucket, hidden: Tensor) -> Tensor:
        """[G, S·R, d] of hidden [S, n, d]."""
        (s, n, d), (g, r) = hidden.shape, b.rows.shape
        return hidden.index_select(1, b.rows.flatten().clamp_(max=n - 1)).view(s, g, r, d).transpose(0, 1).reshape(g, s * r, d)


def _inverse(index: Tensor, size: int) -> Tensor:
    """int64 [size]: where in `index` each of 0 … size − 1 stands; what is not there, at its end. Entries of `size` are padding."""
    place = torch.full((size + 1,), index.numel(), dtype=torch.int64, device=index.device)
    place[index] = torch.arange(index.numel(), device=index.device)
    return place[:size]


def _buckets(row: Tensor, column: Tensor, skip: Tensor, width: int, budget: int) -> Iterator[Bucket]:
    """Group rows by identical list, then bucket groups by shape."""
    device, n = row.device, skip.numel()
    length = torch.bincount(row, minlength=n)
    first = length.cumsum(0) - length
    group = _group_ids(row, column, length, first)
    used = ((length > 0) & ~skip).nonzero().flatten()
    order = used[torch.argsort(group[used], stable=True)]  # rows by group
    members = torch.bincount(group[used])
    begin = members.cumsum(0) - members
    begin, members = begin[members > 0], members[members > 0]
    tokens = length[order[begin]]
    shape = _log2(members) * 64 + _log2(tokens)
    for key in torch.unique(shape).tolist():
        chosen = (shape == key).nonzero().flatten()
        most, longest = int(members[chosen].max()), int(tokens[chosen].max())
        step = max(1, budget // (8 * ((most + longest) * width + most * longest)))
        for part in chosen.split(step):
            offsets = torch.arange(most, device=device)
            present = offsets < members[part, None]
            rows = order[(begin[part, None] + offsets).clamp(max=order.numel() - 1)].masked_fill(~present, n)
            offsets = torch.arange(longest, device=device)
            listed = offsets < tokens[part, None]
            leader = order[begin[part]]
            listed_tokens = column[(first[leader, None] + offsets).clamp(max=column.numel() - 1)].masked_fill(~listed, 0)
            base = first[rows.clamp(max=n - 1)]
            pairs = (base[:, :, None] + offsets).masked_fill(~(present[:, :, None] & listed[:, None, :]), row.numel())
            yield Bucket(rows, listed_tokens, pairs)


def _group_ids(row: Tensor, column: Tensor, length: Tensor, first: Tensor) -> Tensor:
    """[n] ids, equal only for rows whose lists are equal: a 62-bit hash finds them, a comparison with the group's first row confirms."""
    n = length.numel()
    distinct = int(column.max()) + 1
    mixed = _mix(column) if distinct > column.numel() else _mix(torch.arange(distinct, device=column.device)).take(column)
    key = segment_sum(mixed, row, n) * 1024 + length
    _, group = torch.unique(key, return_inverse=True)
    leader = torch.full((int(group.max()) + 1,), n, dtype=torch.int64, device=row.device)
    leader.scatter_reduce_(0, group, torch.arange(n, device=row.device), "amin")
    lead = leader.take(group)
    if bool((length.take(lead) == length).all()):
        place = (first.take(lead) - first).take(row).add_(torch.arange(row.numel(), device=row.device))
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
