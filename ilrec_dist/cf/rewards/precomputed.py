"""The training rewards of a small data set, computed once and kept: later epochs, seeds and methods are answered from memory (METHOD.md §5)."""

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

Compute = Callable[
    [np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]
]  # users, positions → rewards, covered rows of each target


def fits(dataset: InteractionDataset, trie: Trie) -> bool:
    """Whether the first codes' rewards of all training targets, most of what there is, take at most LIMIT_BYTES."""
    return 4 * trie.num_nodes(1) * dataset.num_interactions <= LIMIT_BYTES


class RewardMemory:
    """All training targets of fixed blocks of users are computed together when one of them is first asked for.

    The last bits of a product depend on what else is in it. So nothing is kept of a request as it came: a block is always computed whole, and a
    target's reward has the same bits in whatever batch and epoch it is asked for, in this process or in one that took a dead one's place.
    """

    def __init__(self, dataset: InteractionDataset, trie: Trie, compute: Compute) -> None:
        self.dataset, self.compute = dataset, compute
        self.targets = np.maximum(
            dataset.train_lengths() - 1, 0
        )  # of each user: the positions 1 … targets
        self.first = np.concatenate([[0], np.cumsum(self.targets)])
        counts = num_rewards(
            trie, dataset.items[ragged_ranges(dataset.offsets[:-1] + 1, self.targets)]
        )
        self.counts, self.ends = counts, np.cumsum(counts)
        self.rewards = np.empty(int(counts.sum()), np.float32)
        self.covered = np.empty(len(counts), np.int64)
        self.known = np.zeros(-(-dataset.num_users // BLOCK_USERS), bool)
        self._lock = threading.Lock()  # `learn` may run beside `fetch`

    def holds(self, users: np.ndarray, positions: np.ndarray) -> bool:
        """Whether all are training targets: those of validation and test are nobody's reward."""
        return bool((positions <= self.targets[users]).all())

    def fetch(self, users: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rewards float32 [nnz] and covered rows int64 [T] of training targets."""
        self.learn(np.unique(users // BLOCK_USERS))
        rows = self.first[users] + positions - 1
        counts = self.counts[rows]
        return self.rewards[ragged_ranges(self.ends[rows] - counts, counts)], self.covered[rows]

    def learn(self, blocks: np.ndarray | None = None) -> None:
        """Compute those of the blocks (all: None) that are not known yet."""
        for block in (
            range(len(self.known)) if blocks is None else blocks[~self.known[blocks]].tolist()
        ):
            with self._lock:
                if not self.known[block]:
                    self._learn(block)

    def _learn(self, block: int) -> None:
        users = np.arange(
            block * BLOCK_USERS, min((block + 1) * BLOCK_USERS, self.dataset.num_users)
        )
        low, high = int(self.first[users[0]]), int(self.first[users[-1] + 1])
        begin, end = (int(self.ends[row - 1]) if row else 0 for row in (low, high))
        all_users, positions = (
            np.repeat(users, self.targets[users]),
            ragged_ranges(np.ones(len(users), np.int64), self.targets[users]),
        )
        self.rewards[begin:end], self.covered[low:high] = self.compute(all_users, positions)
        self.known[block] = True
