"""Metrics of one relevant item per user: ranks under the rule `split`, Hit@k and NDCG@k with their expected-rank figures, bootstrap (METHOD.md §9)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CUTOFFS = (1, 5, 10)
METRICS = tuple(f"{name}@{k}" for name in ("hit", "ndcg") for k in CUTOFFS)
EXPECTED = "expected_"  # prefix of the expected-rank figures
UNRANKED = np.iinfo(np.int64).max // 2  # the rank of a target that is not in the list


@dataclass(frozen=True)
class Ranks:
    """Where each user's target stands, best 0. It shares the places [first, first + tied) with the items it cannot be told apart from;
    under the rule `split` these fill consecutive places in integer item-id order and the target's is `rank`."""

    rank: np.ndarray  # int64 [n]; UNRANKED where the target is not in the list
    first: np.ndarray  # int64 [n]; UNRANKED likewise
    tied: np.ndarray  # int64 [n], at least 1


def ranks_of_scores(scores: np.ndarray, targets: np.ndarray) -> Ranks:
    """Ranks in a full ranking: scores float [n, num_items], -inf for items that are not in it; targets int [n].

    Items of equal score are tied. A target that scores -inf is not in the ranking.
    """
    targets = np.asarray(targets, np.int64)
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    first = (scores > own).sum(axis=1)
    equal = scores == own
    tied = equal.sum(axis=1)
    rank = first + (equal & (np.arange(scores.shape[1]) < targets[:, None])).sum(axis=1)
    missing = np.isneginf(own[:, 0])
    return Ranks(
        np.where(missing, UNRANKED, rank),
        np.where(missing, UNRANKED, first),
        np.where(missing, 1, tied),
    )


def ranks_of_lists(items: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int64 [n] ranks of targets int [n] in lists of distinct items, best first, int [n, W] padded with -1; UNRANKED where it is not in."""
    hit = items == np.asarray(targets)[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1), UNRANKED)


def per_user(ranks: Ranks) -> dict[str, np.ndarray]:
    """float64 [n] of every metric in METRICS, and of its expectation over the order of tied items under `expected_` + metric."""
    most = max(CUTOFFS)
    discount = np.where(ranks.rank < most, 1.0 / np.log2(np.minimum(ranks.rank, most) + 2.0), 0.0)
    gain = np.concatenate(
        [[0.0], np.cumsum(1.0 / np.log2(np.arange(most) + 2.0))]
    )  # of the first 0 … most places together
    values: dict[str, np.ndarray] = {}
    for k in CUTOFFS:
        values[f"hit@{k}"] = (ranks.rank < k).astype(np.float64)
        values[f"ndcg@{k}"] = np.where(ranks.rank < k, discount, 0.0)
        low, high = np.minimum(ranks.first, k), np.minimum(ranks.first + ranks.tied, k)
        values[f"{EXPECTED}hit@{k}"] = (high - low) / ranks.tied
        values[f"{EXPECTED}ndcg@{k}"] = (gain[high] - gain[low]) / ranks.tied
    return {prefix + name: values[prefix + name] for prefix in ("", EXPECTED) for name in METRICS}


def summarise(ranks: Ranks) -> dict[str, float]:
    """Means over users of what `per_user` gives; the standard error of each of METRICS stands under metric + `_se`. Raises ValueError for no users."""
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
    """(mean difference, lower, upper end of its percentile interval) of values − versus, float [n] each over the same users in the same order."""
    if values.shape != versus.shape or values.ndim != 1 or len(values) == 0:
        raise ValueError(f"paired values of shapes {values.shape} and {versus.shape}")
    # A resample of users is a multinomial over the distinct differences: a few hundred categories in place of all users, with the same distribution.
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
