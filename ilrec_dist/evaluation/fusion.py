"""Fusion: lists by a mixture of the language model, the CF model and transitions
(METHOD.md §12).

score(i) = Σ_s α_s · log p_s(i | history) over a union of
candidates. A source's normaliser is one number a user for the
language model, whose log p is used as it is: it changes no order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ilrec_dist.evaluation.metrics import Ranks, per_user, ranks_of_scores

# Weights lie on the simplex in steps of 1 / SIMPLEX_STEPS.
SIMPLEX_STEPS = 10
SELECTION_METRIC = "ndcg@10"


@dataclass(frozen=True)
class FusionScores:
    """Candidates of n users with the log p of each source, the language model first."""

    items: np.ndarray  # int64 [n, K] ascending in a row, with -1 at padding
    log_p: np.ndarray  # float64 [n, K, S], -inf at padding
    proposed: np.ndarray  # bool [n, K, S]: which sources a candidate comes from

    def of(self, sources: Sequence[int]) -> FusionScores:
        """Those of some sources alone, with the candidates that come from them."""
        proposed = self.proposed[:, :, sources]
        is_kept = np.logical_or.reduce(proposed, axis=2)
        log_p = np.where(is_kept[:, :, None], self.log_p[:, :, sources], -np.inf)
        return FusionScores(np.where(is_kept, self.items, -1), log_p, proposed)


def candidate_union(lists: list[np.ndarray]) -> np.ndarray:
    """The distinct items of several lists int [n, W_s], padded with -1: int64 [n, K],
    ascending.
    """
    stacked = np.sort(np.concatenate(lists, axis=1).astype(np.int64), axis=1)
    stacked[:, 1:][stacked[:, 1:] == stacked[:, :-1]] = -1
    # Descending by the negated key: padding moves to the end, items stay ascending.
    order = np.argsort(np.where(stacked < 0, np.iinfo(np.int64).max, stacked), axis=1)
    union = np.take_along_axis(stacked, order, axis=1)
    return union[:, : max(1, int((union >= 0).sum(axis=1).max(initial=0)))]


def are_listed(items: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """bool [n, K]: which of the items int [n, K] are in the
    list of their row, int [n, W]; padding, -1, is in none.
    """
    # A key of its own for every item of every row.
    first = np.arange(len(items))[:, None] * (1 + max(items.max(initial=0), lists.max(initial=0)))
    is_in: np.ndarray = np.isin(items + first, (lists + first)[lists >= 0]) & (items >= 0)
    return is_in


def simplex(num_sources: int, steps: int = SIMPLEX_STEPS) -> np.ndarray:
    """float64 [m, num_sources]: all weights ≥ 0 in steps of 1 / steps whose
    sum is 1.
    """
    grid = [
        weights
        for weights in product(range(steps + 1), repeat=num_sources)
        if sum(weights) == steps
    ]
    return np.array(grid, np.float64) / steps


def fused_scores(scores: FusionScores, weights: np.ndarray) -> np.ndarray:
    """float64 [n, K] Σ_s α_s · log p_s; -inf at padding. A source of weight 0 has no
    say.
    """
    used = np.flatnonzero(weights)
    fused: np.ndarray = scores.log_p[:, :, used] @ weights[used]
    return np.where(scores.items >= 0, fused, -np.inf)


def ranks_of_fused(scores: FusionScores, weights: np.ndarray, targets: np.ndarray) -> Ranks:
    """Ranks of targets int [n] among the candidates; equal scores are in item order."""
    is_target = scores.items == targets[:, None]
    column = np.where(is_target.any(axis=1), is_target.argmax(axis=1), scores.items.shape[1])
    # One further column stands for targets that are no candidate, outside of the ranking.
    padded = np.pad(fused_scores(scores, weights), ((0, 0), (0, 1)), constant_values=-np.inf)
    return ranks_of_scores(padded, column)


def choose_weights(scores: FusionScores, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """The weights with the best mean NDCG@10 over the users, and that figure.

    Of equally good weights those that come first in
    `simplex` are taken. Meant for the validation split.
    """
    grid = simplex(scores.log_p.shape[2])
    values = [
        float(per_user(ranks_of_fused(scores, weights, targets))[SELECTION_METRIC].mean())
        for weights in grid
    ]
    best = int(np.argmax(values))
    return grid[best], values[best]
