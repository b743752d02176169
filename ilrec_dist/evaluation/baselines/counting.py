"""The counting baselines that every table has: popularity, and transitions between consecutive items (METHOD.md §9)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import sparse

from ilrec_dist.data.dataset import InteractionDataset

LAST_ITEMS = 6  # of the history, that transitions looks at
AT_ONCE = 1 << 23  # interactions


@dataclass(frozen=True)
class Counts:
    """What the training split holds: pop, int64 [num_items] interactions of each item, and T, float64 [num_items, num_items] consecutive pairs."""

    popularity: np.ndarray
    transitions: sparse.csr_array


def count_training(dataset: InteractionDataset) -> Counts:
    """Count the training split alone: neither validation nor test items, nor the pairs that lead to them. Some millions of interactions at a time."""
    popularity = np.zeros(dataset.num_items, np.int64)
    transitions = sparse.csr_array((dataset.num_items, dataset.num_items), dtype=np.float64)
    starts = np.arange(0, dataset.num_interactions, AT_ONCE)
    bounds = np.unique(np.append(np.searchsorted(dataset.offsets, starts), dataset.num_users))
    for first, last in pairwise(bounds.tolist()):
        users = slice(first, last)
        items = np.asarray(dataset.items[dataset.offsets[first] : dataset.offsets[last]])
        begins = dataset.offsets[users] - dataset.offsets[first]
        place = np.arange(len(items)) - np.repeat(begins, dataset.lengths(users))
        train = place < np.repeat(dataset.train_lengths(users), dataset.lengths(users))
        popularity += np.bincount(items[train], minlength=dataset.num_items)
        second = np.flatnonzero(train & (place > 0))  # the item before a training item is one too
        transitions += sparse.coo_array(
            (np.ones(len(second)), (items[second - 1], items[second])), shape=transitions.shape
        ).tocsr()
    return Counts(popularity, transitions)


def popularity_scores(counts: Counts, users: np.ndarray) -> np.ndarray:
    """float64 [len(users), num_items]: the same for every user (a read-only view)."""
    return np.broadcast_to(
        counts.popularity.astype(np.float64), (len(users), len(counts.popularity))
    )


def transition_scores(
    counts: Counts, dataset: InteractionDataset, users: np.ndarray, split: str
) -> np.ndarray:
    """float64 [len(users), num_items]: Σ over the last 6 history items i of T[i, v] / (rank_i · √pop_i), rank 1 for the latest.

    The history is what `split` may see: at test time it includes the validation item.
    """
    stop = dataset.history_stop(split, users)
    place = stop[:, None] - np.arange(1, LAST_ITEMS + 1)
    row, back = np.nonzero(place >= dataset.offsets[users][:, None])
    item = dataset.items[place[row, back]]
    weight = 1.0 / (
        (back + 1) * np.sqrt(np.maximum(counts.popularity[item], 1))
    )  # an item unseen in training has no pairs: any finite weight will do
    history = sparse.coo_array((weight, (row, item)), shape=(len(users), dataset.num_items)).tocsr()
    return (history @ counts.transitions).toarray()
