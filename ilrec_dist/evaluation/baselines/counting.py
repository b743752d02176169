"""The counting baselines: popularity, and transitions between consecutive items
(METHOD.md §9).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import sparse

from ilrec_dist.data.dataset import InteractionDataset, ItemArray

# The latest items of the history that `transitions` looks at.
RECENT_ITEMS = 6
# Interactions that are counted at once.
CHUNK_INTERACTIONS = 1 << 23


@dataclass(frozen=True)
class TrainingCounts:
    """Counts of the training split."""

    # pop, int64 [num_items]: the interactions of each item.
    popularity: np.ndarray
    # T, float64 [num_items, num_items]: the counts of consecutive pairs.
    transitions: sparse.csr_array


def count_training(dataset: InteractionDataset) -> TrainingCounts:
    """Count the training split alone: no validation or test item, nor a pair that leads
    to one.
    """
    popularity = np.zeros(dataset.num_items, np.int64)
    transitions = sparse.csr_array((dataset.num_items, dataset.num_items), dtype=np.float64)
    starts = np.arange(0, dataset.num_interactions, CHUNK_INTERACTIONS)
    bounds = np.unique(np.append(np.searchsorted(dataset.offsets, starts), dataset.num_users))
    for first, last in pairwise(bounds.tolist()):
        users = slice(first, last)
        items = np.asarray(dataset.items[dataset.offsets[first] : dataset.offsets[last]])
        begins = dataset.offsets[users] - dataset.offsets[first]
        position = np.arange(len(items)) - np.repeat(begins, dataset.lengths(users))
        train = position < np.repeat(dataset.train_lengths(users), dataset.lengths(users))
        popularity += np.bincount(items[train], minlength=dataset.num_items)
        # The item before a training item is a training item too.
        second = np.flatnonzero(train & (position > 0))
        transitions += sparse.coo_array(
            (np.ones(len(second)), (items[second - 1], items[second])), shape=transitions.shape
        ).tocsr()
    return TrainingCounts(popularity, transitions)


def popularity_scores(counts: TrainingCounts, users: np.ndarray) -> np.ndarray:
    """float64 [len(users), num_items]: the same for every user (a read-only view)."""
    return np.broadcast_to(
        counts.popularity.astype(np.float64), (len(users), len(counts.popularity))
    )


def transition_scores(
    counts: TrainingCounts, dataset: InteractionDataset, users: np.ndarray, split: str
) -> np.ndarray:
    """score(v) = Σ over the latest history items i of T[i, v] / (rank_i · √pop_i).

    Rank 1 is the latest item. The history is what `split` may see: at test time
    it includes the validation item. Returns float64 [len(users), num_items].
    """
    return history_transition_scores(
        counts, dataset.items, dataset.offsets[users], dataset.history_stop(split, users)
    )


def history_transition_scores(
    counts: TrainingCounts, items: ItemArray, start: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """The scores of `transition_scores` after the histories items[start[r]
    : stop[r]].
    """
    position = stop[:, None] - np.arange(1, RECENT_ITEMS + 1)
    row, back = np.nonzero(position >= start[:, None])
    item = items[position[row, back]]
    # An item unseen in training has no pairs, so any finite weight will do.
    weight = 1.0 / ((back + 1) * np.sqrt(np.maximum(counts.popularity[item], 1)))
    shape = (len(start), len(counts.popularity))
    history = sparse.coo_array((weight, (row, item)), shape=shape).tocsr()
    scores: np.ndarray = (history @ counts.transitions).toarray()
    return scores
