"""Where the rewards of each target lie: its prefixes and their children at every depth.

Both are ranges of the code-ordered catalogue.
"""

from __future__ import annotations

import numpy as np

from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.items.trie import Trie


def num_rewards(trie: Trie, items: np.ndarray) -> np.ndarray:
    """How many rewards a target with each of these items [T] has: int64 [T].

    They are the children of all its prefixes.
    """
    counts = np.zeros(len(items), np.int64)
    for depth, start in enumerate(trie.child_start):
        node = trie.item_node(depth, items)
        counts += start[node + 1] - start[node]
    return counts


class RewardLayout:
    """For T targets of a trie of C depths: nodes, children and output indices.

    code_position  int64 [T]: of the target item
    first_node     int64 [T]: the target's node of depth 1
    nodes          int64 [C, T]: the target's prefix of depth p
    first_child, num_children  int64 [C, T]: its children are that range of the nodes of
                               depth
        p + 1
    indptr         int64 [T·(C − 1) + 1]: the rows of depth 1 … C − 1, target-major;
                   those of
        `Trie.target_candidates` without the rows of the first codes
    """

    def __init__(self, trie: Trie, items: np.ndarray) -> None:
        """items int64 [T]: the item index of each target."""
        self.trie = trie
        self.code_position = trie.catalogue.position[items].astype(np.int64)
        self.nodes = np.stack([self._node(depth) for depth in range(trie.depth)])
        self.first_node = self._node(1)
        starts = list(zip(trie.child_start, self.nodes, strict=True))
        first = np.stack([start[node] for start, node in starts]).astype(np.int64)
        stop = np.stack([start[node + 1] for start, node in starts]).astype(np.int64)
        self.first_child, self.num_children = first, stop - first
        self.indptr = np.concatenate([[0], np.cumsum(self.num_children[1:].T.ravel())])

    def _node(self, depth: int) -> np.ndarray:
        node: np.ndarray = (
            np.searchsorted(self.trie.node_start[depth], self.code_position, side="right") - 1
        )
        return node

    def code_ranges(self, depth: int, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Code-order [start, stop) of the targets' prefixes of that depth,
        int64 each.
        """
        start, nodes = self.trie.node_start[depth], self.nodes[depth, targets]
        return start[nodes].astype(np.int64), start[nodes + 1].astype(np.int64)

    def child_lengths(self, depth: int, targets: np.ndarray) -> np.ndarray:
        """Items below every child of the targets' prefixes, concatenated, int64."""
        child = ragged_ranges(self.first_child[depth, targets], self.num_children[depth, targets])
        start = self.trie.node_start[depth + 1]
        lengths: np.ndarray = (start[child + 1] - start[child]).astype(np.int64)
        return lengths

    def output_indices(self, depth: int, targets: np.ndarray) -> np.ndarray:
        """Output indices int64 of the targets' rows of that depth ≥ 1, concatenated."""
        rows = targets * (self.trie.depth - 1) + depth - 1
        return ragged_ranges(self.indptr[rows], self.num_children[depth, targets])
