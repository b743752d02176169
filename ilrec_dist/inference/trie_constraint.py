"""The trie as the constraint of a beam search: which tokens may follow, and
for whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ilrec_dist.items.trie import Trie
from ilrec_dist.items.vocabulary import NO_TOKEN


@dataclass(frozen=True)
class ItemSets:
    """One set of items for each row of a batch, as distinct pairs in
    ascending order.
    """

    rows: np.ndarray  # int64 [nnz]
    items: np.ndarray  # int64 [nnz]

    @staticmethod
    def of(histories: Sequence[np.ndarray]) -> ItemSets:
        """The distinct items of each history; histories[r] becomes the set of row r."""
        rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        items = (
            np.concatenate([np.asarray(history, np.int64) for history in histories])
            if len(histories)
            else np.zeros(0, np.int64)
        )
        span = int(items.max(initial=0)) + 1
        return ItemSets(*np.divmod(np.unique(rows * span + items), span))


class TrieConstraint:
    """The trie on the model's device, narrowed to `allowed` items (bool [num_items],
    None: all).

    It is made once and used for every batch. Nodes are those of `Trie`: numbered
    in code order at each depth 0 … C, where -1 stands for a beam that has died.
    """

    def __init__(
        self, trie: Trie, device: torch.device | str = "cpu", allowed: np.ndarray | None = None
    ) -> None:
        self.trie, self.allowed, self.depth = trie, allowed, trie.depth
        self.titles = trie.catalogue.pieces is not None
        in_code_order = (
            np.ones(trie.catalogue.num_items, bool)
            if allowed is None
            else allowed[trie.catalogue.items]
        )
        allowed_before = np.zeros(len(in_code_order) + 1, np.int32)
        np.cumsum(in_code_order, dtype=np.int32, out=allowed_before[1:])
        # Per depth, the number of allowed items below every node.
        self._num_allowed = [np.diff(allowed_before[start]) for start in trie.node_start]
        self._without_allowed = (
            None
            if allowed is None
            else [torch.from_numpy(count == 0).to(device) for count in self._num_allowed]
        )
        # On a CPU these int32 arrays share the trie's own memory.
        self._child_start = [torch.from_numpy(start).to(device) for start in trie.child_start]
        tokens = trie.node_token
        if self.titles:
            vocabulary = trie.catalogue.vocabulary
            # Nodes at and behind a title's end. What stands behind it is fed to the model as
            # padding, so that every token here is an id that the model has.
            ended = [(token == vocabulary.end) | (token == NO_TOKEN) for token in tokens[1:]]
            self._ended = [
                torch.from_numpy(flags).to(device) for flags in [np.zeros(1, bool), *ended]
            ]
            tokens = [np.where(token == NO_TOKEN, vocabulary.padding, token) for token in tokens]
        self._token = [torch.from_numpy(token).to(device) for token in tokens]
        # [start, stop) of the tokens that follow a prefix of depth p.
        self.token_range = [(int(token.min()), int(token.max()) + 1) for token in tokens[1:]]

    def children(self, p: int, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The children of nodes int64 [B, K] at depth p, padded to the widest node.

        Returns (nodes at depth p + 1, their tokens,
        whether there is such a child), [B, K, c] each.
        """
        start, count = self._child_start[p][nodes.clamp(min=0)].long(), self.num_children(p, nodes)
        offset = torch.arange(max(1, int(count.max())), device=nodes.device)
        exists = offset < count[..., None]
        child = torch.where(exists, start[..., None] + offset, 0)
        return child, self._token[p + 1][child].long(), exists

    def num_children(self, p: int, nodes: Tensor) -> Tensor:
        """int64 [B, K]: the number of continuations of nodes at depth p; 0 for -1."""
        alive = nodes.clamp(min=0)
        return (self._child_start[p][alive + 1] - self._child_start[p][alive]).long() * (nodes >= 0)

    def has_ended(self, p: int, nodes: Tensor) -> Tensor:
        """bool [B, K]: whether the titles of nodes int64 [B, K] at depth p
        have ended.
        """
        return self._ended[p][nodes.clamp(min=0)]

    def leaves(self, p: int, nodes: Tensor) -> Tensor:
        """int64 [B, K]: nodes at depth C below nodes at depth p that do not branch; -1
        for -1.
        """
        for start in self._child_start[p:]:
            nodes = torch.where(nodes >= 0, start[nodes.clamp(min=0)].long(), -1)
        return nodes

    def exhausted_nodes(self, excluded: ItemSets, device: torch.device | str) -> list[Tensor]:
        """The nodes below which a row has no allowed item left outside its `excluded`
        set.

        One entry per depth 1 … C: an ascending int64
        list of keys row · num_nodes(depth) + node.
        """
        rows, items = excluded.rows, excluded.items
        if self.allowed is not None:
            rows, items = rows[self.allowed[items]], items[self.allowed[items]]
        exhausted = []
        for p in range(1, self.depth + 1):
            nodes = self.trie.num_nodes(p)
            keys, removed = np.unique(
                rows * nodes + self.trie.item_node(p, items), return_counts=True
            )
            exhausted.append(
                torch.from_numpy(keys[removed == self._num_allowed[p][keys % nodes]]).to(device)
            )
        return exhausted

    def has_item_left(
        self, p: int, child: Tensor, exists: Tensor, first_row: int, exhausted: list[Tensor] | None
    ) -> Tensor:
        """bool [B, K, c]: the children at depth p + 1 that lead to an item which the
        row may get.

        `child` and `exists` are those of `children`, `exhausted` that of
        `exhausted_nodes`, and `first_row` is the batch row of child[0].
        """
        usable = (
            exists
            if self._without_allowed is None
            else exists & ~self._without_allowed[p + 1][child]
        )
        if exhausted is None or exhausted[p].numel() == 0:
            return usable
        row = torch.arange(first_row, first_row + child.shape[0], device=child.device)
        keys = row[:, None, None] * self.trie.num_nodes(p + 1) + child
        position = torch.searchsorted(exhausted[p], keys).clamp(max=exhausted[p].numel() - 1)
        return usable & (exhausted[p][position] != keys)
