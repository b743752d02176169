"""Where a method gains on another: users
split by their target, history and item codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ilrec_dist.evaluation.metrics import paired_bootstrap
from ilrec_dist.items.catalogue import Catalogue

BINS = 5


@dataclass(frozen=True)
class UserSplit:
    """Users in groups: `group` int64 [n] indexes `names`."""

    name: str
    names: Sequence[str]
    group: np.ndarray


@dataclass(frozen=True)
class GroupGain:
    """NDCG@10 of one group of users, and the paired difference with its interval."""

    split: str
    group: str
    users: int
    value: float
    versus: float
    difference: float
    low: float
    high: float


def user_splits(
    targets: np.ndarray,
    history_lengths: np.ndarray,
    popularity: np.ndarray,
    catalogue: Catalogue,
) -> list[UserSplit]:
    """The splits of n users with targets and history lengths int64 [n].

    popularity: int64 [num_items], the training interactions of each item.
    """
    counts = popularity[targets]
    group, names = _bins(counts[counts > 0], "target with {} training interactions")
    by_popularity = np.zeros(len(targets), np.int64)
    by_popularity[counts > 0] = group + 1
    length_group, length_names = _bins(history_lengths, "history of {} items")
    shared = shared_tokens(catalogue)[targets].astype(np.int64)
    return [
        UserSplit("popularity", ["target unseen in training", *names], by_popularity),
        UserSplit("history", length_names, length_group),
        UserSplit("collisions", ["target's code is its own", "target shares its code"], shared),
    ]


def shared_tokens(catalogue: Catalogue) -> np.ndarray:
    """bool [num_items]: whether another item has the same token sequence."""
    same = (catalogue.tokens[1:] == catalogue.tokens[:-1]).all(axis=1)
    in_order = np.zeros(catalogue.num_items, bool)
    in_order[1:] |= same
    in_order[:-1] |= same
    shared: np.ndarray = in_order[catalogue.position]
    return shared


def _bins(values: np.ndarray, name: str) -> tuple[np.ndarray, list[str]]:
    """(the bin of each value, the bins' names): about equally many users a bin.

    Equal values share a bin, so there may be fewer than BINS.
    """
    if not len(values):
        return np.zeros(0, np.int64), []
    edges = np.unique(np.quantile(values, np.arange(1, BINS) / BINS, method="lower"))
    edges = edges[edges < values.max()]
    group = np.searchsorted(edges, values, side="left")
    names = []
    for number in range(len(edges) + 1):
        members = values[group == number]
        low, high = int(members.min()), int(members.max())
        names.append(name.format(f"{low:,}" if low == high else f"{low:,} to {high:,}"))
    return group, names


def group_gains(
    splits: Sequence[UserSplit], values: np.ndarray, versus: np.ndarray
) -> Iterator[GroupGain]:
    """The gain of `values` over `versus`, float64
    [n] each, in every group that has users.
    """
    for split in splits:
        for number, name in enumerate(split.names):
            members = split.group == number
            if members.any():
                difference = paired_bootstrap(values[members], versus[members])
                yield GroupGain(
                    split.name,
                    name,
                    int(members.sum()),
                    float(values[members].mean()),
                    float(versus[members].mean()),
                    *difference,
                )


def as_rows(gains: Iterator[GroupGain]) -> list[Mapping[str, Any]]:
    return [asdict(gain) for gain in gains]
