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
    """

    def __init__(self, row: Tensor, column: Tensor, skip: Tensor, width: int, budget: int) -> None:
        self.n, self.count = skip.numel(), row.numel()
        self.buckets = list(_buckets(row, column, skip, width, budget)) if self.count else []

    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """[S, P] in hidden's dtype, from hidden [S, n, d] and the rank's head rows."""
        s, _, d = hidden.shape
        out = hidden.new_zeros(s, self.count + 1)
        for b in self.buckets:
            g, r = b.rows.shape
            x = hidden[:, b.rows.clamp(max=self.n - 1)].transpose(0, 1).reshape(g, s * r, d)
            w = head[b.tokens].to(hidden.dtype)
            z = torch.bmm(x, w.transpose(1, 2)).view(g, s, r, -1)
            out[:, b.pairs] = z.transpose(0, 1)
        return out[:, :-1]

    def backward(self, grad: Tensor, hidden: Tensor, head: Tensor, hidden_grad: Tensor | None, head_grad: Tensor | None) -> None:
        """Add the gradients of `logits` to hidden_grad [S, n, d] and head_grad [V_local, d], given grad [S, P]."""
        s, _, d = hidden.shape
        padded = torch.cat([grad, grad.new_zeros(s, 1)], 1)
        for b in self.buckets:
            g, r = b.rows.shape
            dz = padded[:, b.pairs].transpose(0, 1).reshape(g, s * r, -1)
            real = b.rows.flatten() < self.n
            if hidden_grad is not None:
                dx = torch.bmm(dz, head[b.tokens].to(grad.dtype)).view(g, s, r, d).transpose(0, 1).reshape(s, g * r, d)
                rows = b.rows.flatten()[real]
                for stream in range(s):  # a row is in one bucket, once
                    hidden_grad[stream].index_add_(0, rows, dx[stream][real])
            if head_grad is not None:
                x = hidden[:, b.rows.clamp(max=self.n - 1)].transpose(0, 1).reshape(g, s * r, d)
                dw = torch.bmm(dz.transpose(1, 2), x)
                add_rows(head_grad, b.tokens.flatten(), dw.flatten(0, 1))  # padding adds zeros to row 0


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
    key = segment_sum(_mix(column), row, n) * 1024 + length
    _, group = torch.unique(key, return_inverse=True)
    leader = torch.full((int(group.max()) + 1,), n, dtype=torch.int64, device=row.device)
    leader.scatter_reduce_(0, group, torch.arange(n, device=row.device), "amin")
    offset = torch.arange(row.numel(), device=row.device) - first.take(row)
    lead = leader.take(group)
    same_length = (length.take(lead) == length).all()
    if same_length and bool((column.take((first.take(lead).take(row) + offset).clamp_(max=column.numel() - 1)) == column).all()):
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
