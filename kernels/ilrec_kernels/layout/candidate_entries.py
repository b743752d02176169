"""The valid_next lists of a chunk of rows as flat (row, token) entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ilrec_kernels.options import TokenLists


class Span(NamedTuple):
    """Rows [begin, end) of a call and, where it has lists, their entries
    [low, high).
    """

    begin: int
    end: int
    low: int = 0
    high: int = 0


@dataclass(frozen=True)
class CandidateEntries:
    """P entries, ascending by (row, token).

    source      int64 [P], index into the call's TokenLists.tokens; −1 for a target that
                its own list lacks
    target      int64 [T], ascending: the entries that are their row's target
    has_target  bool [n]: the target is among the row's candidates
    single      bool [n]: the target is the only candidate, so nothing is to be computed
    """

    n: int
    row: Tensor  # int64 [P], 0 … n − 1
    token: Tensor  # int64 [P], global
    source: Tensor
    target: Tensor
    has_target: Tensor
    single: Tensor

    @staticmethod
    def empty(n: int, device: torch.device) -> CandidateEntries:
        index = torch.zeros(0, dtype=torch.int64, device=device)
        mask = torch.zeros(n, dtype=torch.bool, device=device)
        return CandidateEntries(n, index, index, index, index, mask, mask)

    def in_shard(self, start: int, stop: int) -> CandidateEntries:
        """Return the entries whose token is in [start, stop)."""
        return self.take(((self.token >= start) & (self.token < stop)).nonzero().flatten())

    def take(self, index: Tensor) -> CandidateEntries:
        is_target = torch.zeros_like(self.row, dtype=torch.bool)
        is_target[self.target] = True
        target = is_target.take(index).nonzero().flatten()
        row, token, source = (values.take(index) for values in (self.row, self.token, self.source))
        return CandidateEntries(self.n, row, token, source, target, self.has_target, self.single)

    @property
    def target_row(self) -> Tensor:
        """The rows of `target`, int64 [T]."""
        return self.row.take(self.target)

    def find(self, row: Tensor, token: Tensor) -> Tensor:
        """Return the index of each (row, token) among the entries, −1 where it is
        absent.
        """
        return find_entries(self.row, self.token, row, token)


def find_entries(rows: Tensor, tokens: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """Return where each (row, token) is among (rows, tokens), which ascend; −1:
    nowhere.
    """
    if not rows.numel():
        return torch.full_like(row, -1)
    keys, wanted = (rows << 32) + tokens, (row << 32) + token
    position = torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)
    return position.masked_fill_(keys.take(position) != wanted, -1)


def _span_entries(lists: TokenLists, targets: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
    """Return the span's entries as (row, token), and each row's target among them or
    −1.
    """
    every_row = torch.arange(span.end - span.begin, device=targets.device)
    token = lists.tokens[span.low : span.high]
    lengths = lists.indptr[span.begin : span.end + 1].diff()
    row = torch.repeat_interleave(every_row, lengths, output_size=span.high - span.low)
    target = find_entries(row, token, every_row, targets[span.begin : span.end])
    return row, token, target


def spans_with_all_targets(lists: TokenLists, targets: Tensor, spans: Sequence[Span]) -> list[bool]:
    """Say of each span whether every row's target is in its list.

    This is one question to the device, asked before it has anything else to do.
    """
    complete = [(_span_entries(lists, targets, span)[2] >= 0).all() for span in spans]
    return torch.stack(complete).tolist() if complete else []


def span_entries(
    lists: TokenLists, targets: Tensor, span: Span, complete: bool
) -> CandidateEntries:
    """Return the entries of the span's rows, each row's target among them.

    `targets` [N] are global ids; `complete` is the span's answer of
    spans_with_all_targets.
    """
    n = span.end - span.begin
    row, token, target = _span_entries(lists, targets, span)
    has_target = target >= 0
    single = (lists.indptr[span.begin : span.end + 1].diff() == 1) & has_target
    source = torch.arange(span.low, span.high, device=token.device)
    if complete:
        return CandidateEntries(n, row, token, source, target, has_target, single)
    # The masked softmax also competes for a target that its list lacks: append those
    # targets, then sort by (row, token).
    missing = (~has_target).nonzero().flatten()
    appended = torch.arange(len(row), len(row) + len(missing), device=row.device)
    row = torch.cat([row, missing])
    token = torch.cat([token, targets[span.begin : span.end][missing]])
    source = torch.cat([source, torch.full_like(missing, -1)])
    target = torch.cat([target[has_target], appended])
    entries = CandidateEntries(n, row, token, source, target, has_target, single)
    order = torch.argsort(token, stable=True)
    return entries.take(order[torch.argsort(row[order], stable=True)])
