"""The counting baselines that every table has: popularity, and transitions between consecutive items (METHOD.md §9)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from ilrec_dist.data.prepared import Prepared

LAST_ITEMS = 6  # of the history, that transitions looks at


@dataclass(frozen=True)
class Counts:
    """What the training split holds: pop, int64 [num_items] interactions of each item, and T, float64 [num_items, num_items] consecutive pairs."""

    popularity: np.ndarray
    transitions: sparse.csr_array


def count_training(prepared: Prepared) -> Counts:
    """Count the training split alone: neither validation nor test items, nor the pairs that lead to them."""
    train = prepared.train_mask()
    popularity = np.bincount(prepared.items[train], minlength=prepared.num_items)
    user = prepared.user_of_interaction()
    pair = np.flatnonzero(train[1:] & (user[1:] == user[:-1]))  # the item before a training item is one too
    shape = (prepared.num_items, prepared.num_items)
    transitions = sparse.coo_array((np.ones(len(pair)), (prepared.items[pair], prepared.items[pair + 1])), shape=shape).tocsr()
    return Counts(popularity, transitions)


def popularity_scores(counts: Counts, users: np.ndarray) -> np.ndarray:
    """float64 [len(users), num_items]: the same for every user (a read-only view)."""
    return np.broadcast_to(counts.popularity.astype(np.float64), (len(users), len(counts.popularity)))


def transition_scores(counts: Counts, prepared: Prepared, users: np.ndarray, split: str) -> np.ndarray:
    """float64 [len(users), num_items]: Σ over the last 6 history items i of T[i, v] / (rank_i · √pop_i), rank 1 for the latest.

    The history is what `split` may see: at test time it includes the validation item.
    """
    stop = prepared.history_stop(split, users)
    place = stop[:, None] - np.arange(1, LAST_ITEMS + 1)
    row, back = np.nonzero(place >= prepared.offsets[users][:, None])
    item = prepared.items[place[row, back]]
    weight = 1.0 / ((back + 1) * np.sqrt(np.maximum(counts.popularity[item], 1)))  # an item unseen in training has no pairs: any finite weight will do
    history = sparse.coo_array((weight, (row, item)), shape=(len(users), prepared.num_items)).tocsr()
    return (history @ counts.transitions).toarray()
