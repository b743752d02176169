"""The valid_next lists of a chunk of rows as flat (row, token) pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.segments import segment_sum
from ilrec_kernels.types import TokenLists


@dataclass(frozen=True)
class Pairs:
    """P pairs, ascending by (row, token). Rows whose only candidate is their target may have been dropped: they cost and contribute nothing."""

    n: int
    row: Tensor  # int64 [P], 0 … n−1
    token: Tensor  # int64 [P], global
    source: Tensor  # int64 [P], position in the lists' tokens; −1 for a target that its own list lacks
    has_target: Tensor  # bool [n]: the target is among the row's candidates

    def is_target(self, targets: Tensor) -> Tensor:
        return self.token == targets.take(self.row)

    def in_shard(self, start: int, stop: int) -> Pairs:
        """Those whose token is in [start, stop)."""
        return self.where((self.token >= start) & (self.token < stop))

    def where(self, keep: Tensor) -> Pairs:
        keep = keep.nonzero().flatten()
        return Pairs(self.n, self.row.take(keep), self.token.take(keep), self.source.take(keep), self.has_target)

    def find(self, row: Tensor, token: Tensor) -> Tensor:
        """int64 position of each (row, token) among the pairs, −1 where it is not one."""
        if not self.row.numel():
            return torch.full_like(row, -1)
        width = int(max(self.token.max(), token.max())) + 1 if token.numel() else 1
        keys, wanted = self.row * width + self.token, row * width + token
        position = torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)
        return position.masked_fill_(keys.take(position) != wanted, -1)


def chunk_pairs(lists: TokenLists, targets: Tensor, begin: int, end: int, drop_single: bool) -> Pairs:
    """The pairs of rows [begin, end), each row's target among them; `targets` [end − begin] are global ids."""
    n = end - begin
    indptr = lists.indptr[begin : end + 1]
    low, high = int(indptr[0]), int(indptr[-1])
    token = lists.tokens[low:high]
    length = indptr.diff()
    row = torch.repeat_interleave(torch.arange(n, device=token.device), length, output_size=high - low)
    source = torch.arange(low, high, device=token.device)
    has_target = segment_sum((token == targets.take(row)).to(torch.int32), row, n) > 0
    pairs = Pairs(n, row, token, source, has_target)
    if drop_single:
        single = (length == 1) & has_target
        pairs = pairs.where(~single.take(row))
    if bool(has_target.all()):
        return pairs
    missing = (~has_target).nonzero().flatten()  # the masked softmax competes for the target as well
    row = torch.cat([pairs.row, missing])
    token = torch.cat([pairs.token, targets[missing]])
    source = torch.cat([pairs.source, torch.full_like(missing, -1)])
    order = torch.argsort(token, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    return Pairs(n, row[order], token[order], source[order], has_target)
