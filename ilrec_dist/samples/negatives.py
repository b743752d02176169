"""Items that a target is preferred to (METHOD.md
§11), each a function of seed and target.

Nothing is drawn in sequence: a negative is a hash of (seed, user, position),
so a resumed training, and any number of ranks, draw the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.trie import Trie

# Draws before the items that are left are listed.
ATTEMPTS = 32


class Negatives(Protocol):
    """Where the negatives of targets come from."""

    # n, the negatives of a target.
    count: int

    def draw(self, users: np.ndarray, positions: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """int64 [T, n] items for targets int [T] at (users, positions), int64 [T] each.

        None is in the user's sequence before the
        position, or has the tokens of the target.
        """
        ...


class UniformNegatives:
    """Distinct negatives, uniform over the items outside the history."""

    def __init__(
        self, dataset: InteractionDataset, trie: Trie, count: int, seed: int, stream: int = 0
    ) -> None:
        """stream: another number gives other draws for the same seed."""
        self.dataset, self.trie, self.count = dataset, trie, count
        self.seed, self.stream = seed, stream

    def draw(self, users: np.ndarray, positions: np.ndarray, targets: np.ndarray) -> np.ndarray:
        drawn = np.full((len(users), self.count), -1, np.int64)
        for column in range(self.count):
            missing = np.arange(len(users))
            for attempt in range(ATTEMPTS):
                if not len(missing):
                    break
                keys = users[missing], positions[missing]
                items = hashed(self.seed, self.stream, column, attempt, *keys) % np.uint64(
                    self.dataset.num_items
                )
                items = items.astype(np.int64)
                free = is_free(self.dataset, self.trie, *keys, targets[missing], items[:, None])[
                    :, 0
                ] & (drawn[missing, :column] != items[:, None]).all(axis=1)
                drawn[missing[free], column] = items[free]
                missing = missing[~free]
            for row in missing:
                drawn[row, column] = self._from_the_rest(
                    int(users[row]), int(positions[row]), int(targets[row]), drawn[row, :column]
                )
        return drawn

    def _from_the_rest(self, user: int, position: int, target: int, drawn: np.ndarray) -> int:
        """One of the items that are left, listed;
        any but the target where none is left.
        """
        every = np.arange(self.dataset.num_items)
        other_items = every[~same_tokens(self.trie, every, np.array(target))]
        if not len(other_items):
            raise UserError(
                "preference: the catalogue has no item besides the target, so there is nothing "
                "that it could be preferred to; bring more items"
            )
        history = self.dataset.sequence(user)[:position]
        undrawn = np.setdiff1d(other_items, np.concatenate([history, drawn]))
        undrawn = undrawn if len(undrawn) else other_items
        key = hashed(self.seed, self.stream, len(drawn), ATTEMPTS, user, position)
        return int(undrawn[int(key) % len(undrawn)])


class NoNegatives:
    """Targets alone."""

    count = 0

    def draw(self, users: np.ndarray, positions: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.zeros((len(users), 0), np.int64)


class KeptNegatives:
    """One negative of each target, found before.

    items: int [all targets], in the order of `index`, which numbers (users,
    positions); -1 where nothing was found, and a uniform negative takes its place.
    """

    count = 1

    def __init__(
        self,
        items: np.ndarray,
        index: Callable[[np.ndarray, np.ndarray], np.ndarray],
        otherwise: UniformNegatives,
    ) -> None:
        self.items, self.index, self.otherwise = items, index, otherwise

    def draw(self, users: np.ndarray, positions: np.ndarray, targets: np.ndarray) -> np.ndarray:
        drawn: np.ndarray = self.items[self.index(users, positions)].astype(np.int64)[:, None]
        missing = np.flatnonzero(drawn[:, 0] < 0)
        if len(missing):
            drawn[missing] = self.otherwise.draw(
                users[missing], positions[missing], targets[missing]
            )
        return drawn


class HardNegatives:
    """One item whose text is near the target's, a popular one more often than others.

    neighbours: int [I, P], the items nearest to each item in text, -1 where there are
    fewer. popularity: int [I], training interactions. Of a target's neighbours outside
    the history one is drawn in proportion to its popularity plus one; where there is
    none, any item.
    """

    count = 1

    def __init__(
        self,
        dataset: InteractionDataset,
        trie: Trie,
        neighbours: np.ndarray,
        popularity: np.ndarray,
        seed: int,
    ) -> None:
        self.dataset, self.trie, self.seed = dataset, trie, seed
        self.neighbours, self.popularity = neighbours, popularity
        self._otherwise = UniformNegatives(dataset, trie, 1, seed)

    def draw(self, users: np.ndarray, positions: np.ndarray, targets: np.ndarray) -> np.ndarray:
        pool = self.neighbours[targets].astype(np.int64)  # [T, P]
        known = pool >= 0
        pool = np.where(known, pool, 0)
        free = known & is_free(self.dataset, self.trie, users, positions, targets, pool)
        # The largest of log weight + Gumbel noise is a draw in proportion to the weights.
        keys = hashed(self.seed, users[:, None], positions[:, None], np.arange(pool.shape[1]))
        uniform = (keys.astype(np.float64) + 0.5) / 2.0**64
        scores = np.log1p(self.popularity[pool]) - np.log(-np.log(uniform))
        best = np.where(free, scores, -np.inf).argmax(axis=1)
        drawn: np.ndarray = pool[np.arange(len(pool)), best]
        nowhere = np.flatnonzero(~free.any(axis=1))
        if len(nowhere):
            drawn[nowhere] = self._otherwise.draw(
                users[nowhere], positions[nowhere], targets[nowhere]
            )[:, 0]
        return drawn[:, None]


def is_free(
    dataset: InteractionDataset,
    trie: Trie,
    users: np.ndarray,
    positions: np.ndarray,
    targets: np.ndarray,
    items: np.ndarray,
) -> np.ndarray:
    """bool [T, n]: which items int64 [T, n] may be negatives of their row's target."""
    seen = in_history(dataset, users, positions, items)
    free: np.ndarray = ~seen & ~same_tokens(trie, items, targets[:, None])
    return free


def same_tokens(trie: Trie, items: np.ndarray, other_items: np.ndarray) -> np.ndarray:
    """bool: whether the items have the same token sequence as the others."""
    equal: np.ndarray = trie.item_node(trie.depth, items) == trie.item_node(trie.depth, other_items)
    return equal


def in_history(
    dataset: InteractionDataset, users: np.ndarray, positions: np.ndarray, items: np.ndarray
) -> np.ndarray:
    """bool [T, n]: whether items int64 [T, n] stand before positions int64 [T] ≥ 1.

    Row t looks in the sequence of users[t]. Each user's sequence is read once.
    """
    if not len(users):
        return np.zeros(items.shape, bool)
    unique, local = np.unique(users, return_inverse=True)
    lengths = np.zeros(len(unique), np.int64)
    np.maximum.at(lengths, local, positions)
    owner = np.repeat(np.arange(len(unique)), lengths)
    sequences = dataset.items[ragged_ranges(dataset.offsets[unique], lengths)]
    # The first place of each of a user's items.
    keys, first = np.unique(owner * dataset.num_items + sequences, return_index=True)
    wanted = local[:, None] * dataset.num_items + items
    index = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    begin = (np.cumsum(lengths) - lengths)[local]
    is_member = (keys[index] == wanted) & (first[index] - begin[:, None] < positions[:, None])
    return np.asarray(is_member)


def hashed(*parts: int | np.ndarray) -> np.ndarray:
    """uint64, broadcast over the parts: splitmix64 of one after the other."""
    state: np.ndarray = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = _splitmix64(np.asarray(part).astype(np.uint64) ^ state)
    return np.asarray(state)


def _splitmix64(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))
