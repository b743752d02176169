"""The training rewards of a small data set, computed once (METHOD.md §5).

Later epochs, seeds and methods are answered from memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from ilrec_dist.cf.rewards.layout import num_rewards
from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.trie import Trie

LIMIT_BYTES = 512 << 20
BLOCK_USERS = 256

# users, positions int64 [T] → (rewards float32 [nnz], covered rows int64 [T] of each target).
Compute = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def fits_in_memory(dataset: InteractionDataset, trie: Trie) -> bool:
    """Whether the first codes' rewards of all targets take at most LIMIT_BYTES.

    They are most of all rewards.
    """
    return 4 * trie.num_nodes(1) * dataset.num_interactions <= LIMIT_BYTES


class PrecomputedRewards:
    """Computes all training targets of a block of users when one is first asked for.

    The last bits of a product depend on what else is in it. So nothing is kept of a
    request as it came: a block is always computed whole, and a target's reward has the
    same bits in whatever batch and epoch it is asked for, in this process or in one
    that took a dead one's place.
    """

    def __init__(self, dataset: InteractionDataset, trie: Trie, compute: Compute) -> None:
        self.dataset, self.compute = dataset, compute
        # The training targets of each user: the positions 1 … targets.
        self.targets = np.maximum(dataset.train_lengths() - 1, 0)
        # Each user's first row, of the rows of all targets.
        self.first_row = np.concatenate([[0], np.cumsum(self.targets)])
        items = dataset.items[ragged_ranges(dataset.offsets[:-1] + 1, self.targets)]
        self.counts = num_rewards(trie, items)
        self.ends = np.cumsum(self.counts)
        self.rewards = np.empty(int(self.counts.sum()), np.float32)
        self.covered = np.empty(len(self.counts), np.int64)
        self.computed = np.zeros(-(-dataset.num_users // BLOCK_USERS), bool)
        # `compute_blocks` may run beside `fetch`.
        self._lock = threading.Lock()

    def holds(self, users: np.ndarray, positions: np.ndarray) -> bool:
        """Whether all are training targets: no others are trained on."""
        return bool((positions <= self.targets[users]).all())

    def fetch(self, users: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rewards float32 [nnz] and covered rows int64 [T] of training targets."""
        self.compute_blocks(np.unique(users // BLOCK_USERS))
        rows = self.first_row[users] + positions - 1
        counts = self.counts[rows]
        return self.rewards[ragged_ranges(self.ends[rows] - counts, counts)], self.covered[rows]

    def compute_blocks(self, blocks: np.ndarray | None = None) -> None:
        """Compute those of the blocks (all: None) that have not been computed yet."""
        if blocks is None:
            blocks = np.arange(len(self.computed))
        for block in blocks[~self.computed[blocks]].tolist():
            with self._lock:
                if not self.computed[block]:
                    self._compute_block(block)

    def _compute_block(self, block: int) -> None:
        stop = min((block + 1) * BLOCK_USERS, self.dataset.num_users)
        users = np.arange(block * BLOCK_USERS, stop)
        low, high = int(self.first_row[users[0]]), int(self.first_row[users[-1] + 1])
        begin, end = (int(self.ends[row - 1]) if row else 0 for row in (low, high))
        target_users = np.repeat(users, self.targets[users])
        positions = ragged_ranges(np.ones(len(users), np.int64), self.targets[users])
        self.rewards[begin:end], self.covered[low:high] = self.compute(target_users, positions)
        self.computed[block] = True
