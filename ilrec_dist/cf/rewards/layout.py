"""Where each target's rewards lie: its prefix and that prefix's children at every depth, as ranges of the code-ordered catalogue."""

from __future__ import annotations

import numpy as np

from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.items.trie import Trie


def num_rewards(trie: Trie, items: np.ndarray) -> np.ndarray:
    """int64 [T]: how many rewards a target with each of these items has: the children of all its prefixes."""
    counts = np.zeros(len(items), np.int64)
    for depth, start in enumerate(trie.child_start):
        node = trie.item_node(depth, items)
        counts += start[node + 1] - start[node]
    return counts


class Plan:
    """For T targets: the node of each at every depth, its children, and the place of each (target, depth) row in the flat output.

    order    [T] code-order position of the target item
    first_node [T] the target's node of depth 1
    nodes    [C, T] the target's prefix of depth p; first_child, children [C, T]: its children are that range of the nodes of depth p + 1
    indptr   [T·(C − 1) + 1] of the rows of depth 1 … C − 1, target-major: those of `trie.target_candidates` without the first codes'
    """

    def __init__(self, trie: Trie, items: np.ndarray) -> None:
        self.trie = trie
        self.order = trie.catalogue.position[items].astype(np.int64)
        self.nodes = np.stack(
            [
                np.searchsorted(trie.node_start[p], self.order, side="right") - 1
                for p in range(trie.depth)
            ]
        )
        self.first_node = np.searchsorted(trie.node_start[1], self.order, side="right") - 1
        first = np.stack([trie.child_start[p][self.nodes[p]] for p in range(trie.depth)]).astype(
            np.int64
        )
        stop = np.stack([trie.child_start[p][self.nodes[p] + 1] for p in range(trie.depth)]).astype(
            np.int64
        )
        self.first_child, self.children = first, stop - first
        self.indptr = np.concatenate([[0], np.cumsum(self.children[1:].T.ravel())])

    def ranges(self, depth: int, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Code-order [start, stop) of the targets' prefixes of that depth, int64."""
        start, nodes = self.trie.node_start[depth], self.nodes[depth, targets]
        return start[nodes].astype(np.int64), start[nodes + 1].astype(np.int64)

    def child_lengths(self, depth: int, targets: np.ndarray) -> np.ndarray:
        """Items below every child of the targets' prefixes, concatenated, int64."""
        child = ragged_ranges(self.first_child[depth, targets], self.children[depth, targets])
        return (
            self.trie.node_start[depth + 1][child + 1] - self.trie.node_start[depth + 1][child]
        ).astype(np.int64)

    def place(self, depth: int, targets: np.ndarray) -> np.ndarray:
        """Indices into the output of the targets' rows of that depth ≥ 1, concatenated."""
        return ragged_ranges(
            self.indptr[targets * (self.trie.depth - 1) + depth - 1], self.children[depth, targets]
        )
