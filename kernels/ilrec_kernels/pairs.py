"""The valid_next lists of a chunk of rows as flat (row, token) pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.problem import Span
from ilrec_kernels.types import TokenLists


@dataclass(frozen=True)
class Pairs:
    """P pairs, ascending by (row, token)."""

    n: int
    row: Tensor  # int64 [P], 0 … n−1
    token: Tensor  # int64 [P], global
    source: Tensor  # int64 [P], position in the lists' tokens; −1 for a target that its own list lacks
    target: Tensor  # int64 [T], ascending: the pairs that are their row's target
    has_target: Tensor  # bool [n]: the target is among the row's candidates
    single: Tensor  # bool [n]: it is the only one, so that nothing is to be computed

    def in_shard(self, start: int, stop: int) -> Pairs:
        """Those whose token is in [start, stop)."""
        return self.take(((self.token >= start) & (self.token < stop)).nonzero().flatten())

    def take(self, index: Tensor) -> Pairs:
        is_target = torch.zeros_like(self.row, dtype=torch.bool)
        is_target[self.target] = True
        target = is_target.take(index).nonzero().flatten()
        return Pairs(self.n, self.row.take(index), self.token.take(index), self.source.take(index), target, self.has_target, self.single)

    @property
    def target_row(self) -> Tensor:
        """int64 [T] the rows of `target`."""
        return self.row.take(self.target)

    def find(self, row: Tensor, token: Tensor) -> Tensor:
        """int64 position of each (row, token) among the pairs, −1 where it is not one."""
        if not self.row.numel():
            return torch.full_like(row, -1)
        width = int(max(self.token.max(), token.max())) + 1 if token.numel() else 1
        keys, wanted = self.row * width + self.token, row * width + token
        position = torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)
        return position.masked_fill_(keys.take(position) != wanted, -1)


def chunk_pairs(lists: TokenLists, targets: Tensor, span: Span) -> Pairs:
    """The pairs of the span's rows, each row's target among them; `targets` [n] are global ids."""
    n, low, high = span.end - span.begin, span.low, span.high
    token = lists.tokens[low:high]
    length = lists.indptr[span.begin : span.end + 1].diff()
    row = torch.repeat_interleave(torch.arange(n, device=token.device), length, output_size=high - low)
    target = (token == targets.take(row)).nonzero().flatten()
    has_target = torch.zeros(n, dtype=torch.bool, device=token.device)
    has_target[row.take(target)] = True
    pairs = Pairs(n, row, token, torch.arange(low, high, device=token.device), target, has_target, (length == 1) & has_target)
    missing = (~has_target).nonzero().flatten()
    if not missing.numel():
        return pairs
    # the masked softmax competes for the target as well
    row, token = torch.cat([row, missing]), torch.cat([token, targets[missing]])
    target = torch.cat([target, torch.arange(len(pairs.row), len(row), device=row.device)])
    pairs = Pairs(n, row, token, torch.cat([pairs.source, torch.full_like(missing, -1)]), target, has_target, pairs.single)
    order = torch.argsort(token, stable=True)
    return pairs.take(order[torch.argsort(row[order], stable=True)])
