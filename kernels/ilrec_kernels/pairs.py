"""The valid_next lists of a chunk of rows as flat (row, token) pairs."""

from __future__ import annotations

from collections.abc import Sequence
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
    source: (
        Tensor  # int64 [P], position in the lists' tokens; −1 for a target that its own list lacks
    )
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
        return Pairs(
            self.n,
            self.row.take(index),
            self.token.take(index),
            self.source.take(index),
            target,
            self.has_target,
            self.single,
        )

    @property
    def target_row(self) -> Tensor:
        """int64 [T] the rows of `target`."""
        return self.row.take(self.target)

    def find(self, row: Tensor, token: Tensor) -> Tensor:
        """int64 position of each (row, token) among the pairs, −1 where it is not one."""
        return find_pairs(self.row, self.token, row, token)


def find_pairs(rows: Tensor, tokens: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """int64: where each (row, token) is among the pairs (rows, tokens), which ascend; −1 where it is not one."""
    if not rows.numel():
        return torch.full_like(row, -1)
    keys, wanted = (rows << 32) + tokens, (row << 32) + token
    position = torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)
    return position.masked_fill_(keys.take(position) != wanted, -1)


def listed(lists: TokenLists, targets: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
    """(row and token of each entry of the span's lists, where each row's target is among them, or −1)."""
    low, high, everyone = (
        span.low,
        span.high,
        torch.arange(span.end - span.begin, device=targets.device),
    )
    token = lists.tokens[low:high]
    row = torch.repeat_interleave(
        everyone, lists.indptr[span.begin : span.end + 1].diff(), output_size=high - low
    )
    return row, token, find_pairs(row, token, everyone, targets[span.begin : span.end])


def lists_hold_targets(lists: TokenLists, targets: Tensor, spans: Sequence[Span]) -> list[bool]:
    """Of each span, whether every row's target is in its list: one question to the device, asked before it has anything else to do."""
    found = [(listed(lists, targets, span)[2] >= 0).all() for span in spans]
    return torch.stack(found).tolist() if found else []


def chunk_pairs(lists: TokenLists, targets: Tensor, span: Span, complete: bool) -> Pairs:
    """The pairs of the span's rows, each row's target among them; `targets` [N] are global ids. Complete: as of `lists_hold_targets`."""
    n, low, high = span.end - span.begin, span.low, span.high
    row, token, target = listed(lists, targets, span)
    has_target = target >= 0
    single = (lists.indptr[span.begin : span.end + 1].diff() == 1) & has_target
    source = torch.arange(low, high, device=token.device)
    if complete:
        return Pairs(n, row, token, source, target, has_target, single)
    pairs = Pairs(n, row, token, source, target[has_target], has_target, single)
    missing, targets = (~has_target).nonzero().flatten(), targets[span.begin : span.end]
    # the masked softmax competes for the target as well
    row, token = torch.cat([row, missing]), torch.cat([token, targets[missing]])
    target = torch.cat([target, torch.arange(len(pairs.row), len(row), device=row.device)])
    pairs = Pairs(
        n,
        row,
        token,
        torch.cat([pairs.source, torch.full_like(missing, -1)]),
        target,
        has_target,
        pairs.single,
    )
    order = torch.argsort(token, stable=True)
    return pairs.take(order[torch.argsort(row[order], stable=True)])
