"""Metrics of one relevant item per user: ranks, Hit@k, NDCG@k, paired bootstrap
(METHOD.md §9).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CUTOFFS = (1, 5, 10)
METRICS = tuple(f"{name}@{k}" for name in ("hit", "ndcg") for k in CUTOFFS)
# Prefix of the expected-rank figures.
EXPECTED = "expected_"
# The rank of a target that is not in the list.
UNRANKED = np.iinfo(np.int64).max // 2


@dataclass(frozen=True)
class Ranks:
    """The rank of each user's target, best 0.

    The target shares the ranks [first, first + tied) with the items it
    cannot be told apart from. Under the rule `split` these fill
    consecutive ranks in integer item-id order, and the target's is `rank`.
    """

    # UNRANKED where the target is not in the list, as in `first`.
    rank: np.ndarray  # int64 [n]
    first: np.ndarray  # int64 [n]
    tied: np.ndarray  # int64 [n], at least 1


def ranks_of_scores(scores: np.ndarray, targets: np.ndarray) -> Ranks:
    """Ranks of targets int [n] in a full ranking by scores float [n, num_items].

    Items of equal score are tied. Score -inf takes
    an item out of the ranking, a target too.
    """
    targets = np.asarray(targets, np.int64)
    target_score = np.take_along_axis(scores, targets[:, None], axis=1)
    first = (scores > target_score).sum(axis=1)
    equal = scores == target_score
    tied = equal.sum(axis=1)
    rank = first + (equal & (np.arange(scores.shape[1]) < targets[:, None])).sum(axis=1)
    missing = np.isneginf(target_score[:, 0])
    return Ranks(
        np.where(missing, UNRANKED, rank),
        np.where(missing, UNRANKED, first),
        np.where(missing, 1, tied),
    )


def ranks_of_lists(items: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int64 [n] ranks of targets int [n] in lists of distinct items, best first.

    items int [n, W] is padded with -1. A target that is not in its list is UNRANKED.
    """
    return first_column(items == np.asarray(targets)[:, None])


def first_column(mask: np.ndarray) -> np.ndarray:
    """int64 [n]: the first column of mask bool [n, W] that is True, UNRANKED where none
    is.
    """
    if mask.shape[1] == 0:
        return np.full(len(mask), UNRANKED)
    return np.where(mask.any(axis=1), mask.argmax(axis=1), UNRANKED)


def per_user(ranks: Ranks) -> dict[str, np.ndarray]:
    """float64 [n] of every metric in METRICS.

    `expected_` + metric is its expectation over the orders of tied items.
    """
    most = max(CUTOFFS)
    discount = np.where(ranks.rank < most, 1.0 / np.log2(np.minimum(ranks.rank, most) + 2.0), 0.0)
    # The sum of the first 0 … most discounts.
    gain = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(most) + 2.0))])
    values: dict[str, np.ndarray] = {}
    for k in CUTOFFS:
        values[f"hit@{k}"] = (ranks.rank < k).astype(np.float64)
        values[f"ndcg@{k}"] = np.where(ranks.rank < k, discount, 0.0)
        low, high = np.minimum(ranks.first, k), np.minimum(ranks.first + ranks.tied, k)
        values[f"{EXPECTED}hit@{k}"] = (high - low) / ranks.tied
        values[f"{EXPECTED}ndcg@{k}"] = (gain[high] - gain[low]) / ranks.tied
    return {prefix + name: values[prefix + name] for prefix in ("", EXPECTED) for name in METRICS}


def mean_metrics(ranks: Ranks) -> dict[str, float]:
    """Means over users of what `per_user` gives.

    The standard error of each of METRICS is added as
    metric + `_se`. Raises ValueError for no users.
    """
    if len(ranks.rank) == 0:
        raise ValueError("metrics of no users")
    figures: dict[str, float] = {}
    for name, values in per_user(ranks).items():
        figures[name] = float(values.mean())
        if not name.startswith(EXPECTED):
            figures[f"{name}_se"] = (
                float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
            )
    return figures


def paired_bootstrap(
    values: np.ndarray,
    versus: np.ndarray,
    *,
    samples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The mean of values − versus and its percentile interval over resampled users.

    Both are float [n] over the same users in the
    same order. Returns (mean, lower end, upper end).
    """
    if values.shape != versus.shape or values.ndim != 1 or len(values) == 0:
        raise ValueError(f"paired values of shapes {values.shape} and {versus.shape}")
    # A resample of users is a multinomial over the distinct differences: a few hundred categories
    # in place of all users, with the same distribution.
    distinct, counts = np.unique(values - versus, return_counts=True)
    share = counts / counts.sum()
    rng = np.random.default_rng(seed)
    rows = max(1, (1 << 24) // len(distinct))
    means = [
        rng.multinomial(len(values), share, size=min(rows, samples - start)) @ distinct
        for start in range(0, samples, rows)
    ]
    low, high = np.quantile(np.concatenate(means) / len(values), [(1 - level) / 2, (1 + level) / 2])
    return float((values - versus).mean()), float(low), float(high)
