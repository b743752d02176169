"""A catalogue's prefix trie as ranges: a prefix's next tokens and its items are array
slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ilrec_dist.common.files import map_array, read_json_object, sha256_file, write_json
from ilrec_dist.common.manifest import MANIFEST, check_hashes, verified
from ilrec_dist.common.ragged import ragged_csr
from ilrec_dist.items.catalogue import REPAIR, Catalogue


class Trie:
    """Nodes at depth p (0 … C) are numbered in code order; node 0 at depth 0 is the
    root.

    node_start[p]  int32 [nodes_p + 1]: node j covers the code-order positions
                   [node_start[p][j], node_start[p][j + 1])
    node_token[p]  int32 [nodes_p]: last token id of the prefix; empty at p = 0
    child_start[p] int32 [nodes_p + 1], p < C: children of node j are the nodes
                   [child_start[p][j], child_start[p][j + 1]) of depth p + 1, so
                   their tokens are that slice of node_token[p + 1], ascending
    """

    def __init__(self, catalogue: Catalogue) -> None:
        depth, tokens, n = catalogue.depth, catalogue.tokens, catalogue.num_items
        node_start: list[np.ndarray] = [np.array([0, n], np.int32)]
        # The positions at which a prefix of the current depth begins.
        first = np.zeros(n, bool)
        first[:1] = True
        for level in range(depth):
            first[1:] |= tokens[1:, level] != tokens[:-1, level]
            node_start.append(np.append(np.flatnonzero(first), n).astype(np.int32))
        child_start = [
            np.searchsorted(node_start[p + 1], node_start[p]).astype(np.int32) for p in range(depth)
        ]
        # One array holds all tokens, with a view per depth: candidates of several depths are then
        # one gather. It ends in padding for the fixed windows that `candidates` copies.
        widest = max(catalogue.level_sizes)
        labels = np.concatenate(
            [*(tokens[node_start[p + 1][:-1], p] for p in range(depth)), np.zeros(widest, np.int32)]
        )
        self._hold(catalogue, node_start, child_start, labels)

    def _hold(
        self,
        catalogue: Catalogue,
        node_start: list[np.ndarray],
        child_start: list[np.ndarray],
        labels: np.ndarray,
    ) -> None:
        self.catalogue, self.depth = catalogue, catalogue.depth
        self.node_start, self.child_start, self._tokens = node_start, child_start, labels
        self._token_base = np.cumsum([0] + [len(start) - 1 for start in node_start[1:]])
        self.node_token = [np.zeros(0, np.int32)] + [
            labels[a:b] for a, b in zip(self._token_base[:-1], self._token_base[1:], strict=True)
        ]

    def save(self, folder: str | Path) -> None:
        """Write trie.npy and trie.json (with its SHA-256) beside the
        catalogue's files.
        """
        path, arrays = Path(folder) / "trie.npy", self._arrays()
        stored = np.lib.format.open_memmap(
            path, mode="w+", dtype=np.int32, shape=(sum(map(len, arrays)),)
        )
        for part, array in zip(_cut(stored, [len(array) for array in arrays]), arrays, strict=True):
            part[:] = array
        stored.flush()
        nodes = [self.num_nodes(p) for p in range(self.depth + 1)]
        write_json(path.with_suffix(".json"), {"nodes": nodes, "sha256": sha256_file(path)})

    @staticmethod
    def load(folder: str | Path, catalogue: Catalogue) -> Trie:
        """Map what `save` wrote beside this catalogue. Raises UserError when it is
        damaged.
        """
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            verified(folder, "trie.json", REPAIR)
        meta = read_json_object(folder / "trie.json", REPAIR)
        check_hashes(folder, {"trie.npy": meta.get("sha256")}, "trie.json", REPAIR)
        stored, starts = map_array(folder / "trie.npy"), [count + 1 for count in meta["nodes"]]
        *arrays, labels = _cut(
            stored, [*starts, *starts[:-1], len(stored) - sum(starts) - sum(starts[:-1])]
        )
        trie = Trie.__new__(Trie)
        trie._hold(catalogue, arrays[: len(starts)], arrays[len(starts) :], labels)
        return trie

    def _arrays(self) -> list[np.ndarray]:
        return [*self.node_start, *self.child_start, self._tokens]

    def num_nodes(self, p: int) -> int:
        return len(self.node_start[p]) - 1

    @property
    def nbytes(self) -> int:
        """Memory of the trie's own arrays, without the catalogue's."""
        return sum(array.nbytes for array in self._arrays())

    def item_node(self, p: int, items: np.ndarray) -> np.ndarray:
        """int64 nodes at depth p whose range holds the items (item indices,
        any shape).
        """
        position = self.catalogue.position[items]
        return np.asarray(np.searchsorted(self.node_start[p], position, side="right") - 1)

    def children(self, p: int, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """CSR of the continuations of R nodes at depth p < C.

        Returns (indptr int64 [R+1], tokens int64 [nnz] ascending in a row, nodes at
        depth p + 1 int64 [nnz]).
        """
        nodes = np.asarray(nodes)
        start = self.child_start[p][nodes]
        indptr, child = ragged_csr(start, self.child_start[p][nodes + 1] - start)
        return indptr, self.node_token[p + 1][child].astype(np.int64), child

    def candidates(self, p: int, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of `children` alone, for many prefixes at once.

        Returns (indptr int64 [R+1], tokens int32 [nnz], ascending in a row).
        """
        start = self.child_start[p][nodes].astype(np.int64)
        counts = self.child_start[p][np.asarray(nodes) + 1] - start
        width = int(counts.max(initial=0))
        if len(start) * width > 2 * counts.sum():
            indptr, where = ragged_csr(start + self._token_base[p], counts)
            return indptr, self._tokens[where]
        # Where rows are of about one length, copying fixed windows and cutting them is faster than
        # an index for each element.
        indptr = np.zeros(len(start) + 1, np.int64)
        np.cumsum(counts, out=indptr[1:])
        if width == 0:
            return indptr, np.zeros(0, np.int32)
        windows = np.lib.stride_tricks.sliding_window_view(self._tokens, width)
        rows = windows[start + self._token_base[p]]
        if len(rows) * width == indptr[-1]:
            return indptr, rows.reshape(-1)
        return indptr, rows[np.arange(width) < counts[:, None]]

    def step(self, p: int, nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """int64 nodes at depth p + 1 reached from nodes at depth p by tokens (same
        shape).

        -1 where there is none, or where the node is -1.
        """
        nodes, tokens = np.broadcast_arrays(
            np.asarray(nodes, np.int64), np.asarray(tokens, np.int64)
        )
        known = nodes >= 0
        start, labels = self.child_start[p], self.node_token[p + 1]
        low = np.where(known, start[nodes], 0).astype(np.int64)
        # The end of the node's children is at nodes + 1; where the node is -1 any valid index does.
        stop = np.where(known, start[nodes + known], 0).astype(np.int64)
        high = stop.copy()
        # The lower bound of the token among the node's children, for all rows at once.
        while (open_ := low < high).any():
            middle = (low + high) // 2
            right = open_ & (labels[np.minimum(middle, len(labels) - 1)] < tokens)
            low = np.where(right, middle + 1, low)
            high = np.where(open_ & ~right, middle, high)
        has_child = (low < stop) & (labels[np.minimum(low, len(labels) - 1)] == tokens)
        return np.where(has_child, low, -1)

    def leaf_items(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CSR of the items of R nodes at depth C: (indptr int64 [R+1], item indices
        int64).

        Items that share a tuple are in item-id order.
        """
        return self.range_items(self.depth, nodes)

    def range_items(self, p: int, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CSR of all items below R nodes at depth p, in code order.

        Returns (indptr int64 [R+1], item indices int64).
        """
        nodes = np.asarray(nodes)
        start = self.node_start[p][nodes]
        indptr, where = ragged_csr(start, self.node_start[p][nodes + 1] - start)
        return indptr, self.catalogue.items[where].astype(np.int64)

    def target_candidates(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The continuations at every step of T target items (METHOD.md §2,
        `valid_next`).

        Rows are target-major, then depth: t0d0, t0d1, …, t0d(C-1), t1d0, … Returns
        (indptr int64 [T·C+1], tokens int64 [nnz], ascending in a row).
        """
        items = np.asarray(items)
        starts = np.empty((len(items), self.depth), np.int64)
        counts = np.empty((len(items), self.depth), np.int64)
        for p in range(self.depth):
            nodes = self.item_node(p, items)
            first = self.child_start[p][nodes]
            counts[:, p] = self.child_start[p][nodes + 1] - first
            starts[:, p] = first + self._token_base[p]
        indptr, where = ragged_csr(starts.ravel(), counts.ravel())
        return indptr, self._tokens[where].astype(np.int64)


def _cut(array: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    return np.split(array, np.cumsum(lengths)[:-1])
