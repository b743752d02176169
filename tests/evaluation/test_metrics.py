"""Metrics against their definitions, written out one user at a time."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilrec_dist.evaluation.metrics import (
    METRICS,
    UNRANKED,
    Ranks,
    mean_metrics,
    paired_bootstrap,
    per_user,
    ranks_of_lists,
    ranks_of_scores,
)


def hit(rank: int, k: int) -> float:
    return float(rank < k)


def ndcg(rank: int, k: int) -> float:
    return 1 / math.log2(rank + 2) if rank < k else 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.data())
def test_ranks_and_expectations(levels: list[int], data: st.DataObject) -> None:
    """Few score levels make ties; the expectation is the mean over all orders of tied
    items.
    """
    target = data.draw(st.integers(0, len(levels) - 1))
    ranks = ranks_of_scores(np.array([levels], np.float64), np.array([target]))
    order = sorted(range(len(levels)), key=lambda item: (-levels[item], item))
    assert ranks.rank[0] == order.index(target)
    figures = per_user(ranks)
    tied = [item for item in range(len(levels)) if levels[item] == levels[target]]
    above = sum(level > levels[target] for level in levels)
    places = [above + shuffled.index(target) for shuffled in permutations(tied)]
    for k in (1, 5, 10):
        assert figures[f"hit@{k}"][0] == hit(order.index(target), k)
        assert figures[f"ndcg@{k}"][0] == pytest.approx(ndcg(order.index(target), k))
        assert figures[f"expected_hit@{k}"][0] == pytest.approx(
            np.mean([hit(place, k) for place in places])
        )
        assert figures[f"expected_ndcg@{k}"][0] == pytest.approx(
            np.mean([ndcg(place, k) for place in places])
        )
        assert figures[f"ndcg@{k}"][0] <= figures[f"hit@{k}"][0]


def test_a_target_outside_the_ranking_counts_nothing() -> None:
    ranks = ranks_of_scores(np.array([[1.0, -np.inf, 0.0], [0.0, 2.0, 1.0]]), np.array([1, 1]))
    assert ranks.rank.tolist() == [UNRANKED, 0]
    assert {
        name: values.tolist()
        for name, values in per_user(ranks).items()
        if values[0] or values[1] != 1
    } == {}
    assert ranks_of_lists(np.array([[4, 2, -1], [7, 8, 9]]), np.array([2, 1])).tolist() == [
        1,
        UNRANKED,
    ]


def test_an_empty_list_ranks_nobody() -> None:
    assert ranks_of_lists(np.zeros((2, 0), np.int32), np.array([0, 1])).tolist() == [UNRANKED] * 2
    assert ranks_of_lists(np.full((2, 3), -1), np.array([0, 1])).tolist() == [UNRANKED] * 2


def test_summary() -> None:
    ranks = Ranks(
        np.array([0, 3, UNRANKED, 7]), np.array([0, 3, UNRANKED, 6]), np.array([1, 1, 1, 2])
    )
    figures = mean_metrics(ranks)
    assert figures["hit@5"] == 0.5 and figures["hit@10"] == 0.75
    assert figures["ndcg@10"] == pytest.approx((1 + 1 / math.log2(5) + 1 / math.log2(9)) / 4)
    assert figures["hit@5_se"] == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)
    assert figures["expected_ndcg@10"] == pytest.approx(
        (1 + 1 / math.log2(5) + (1 / math.log2(8) + 1 / math.log2(9)) / 2) / 4
    )
    assert set(METRICS) <= figures.keys()
    with pytest.raises(ValueError, match="no users"):
        mean_metrics(Ranks(*(np.zeros(0, np.int64),) * 3))


def test_paired_bootstrap() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random(400), rng.random(400)
    middle, low, high = paired_bootstrap(first, second, seed=1)
    draws = rng.integers(0, 400, (4000, 400))
    expected = np.quantile((first - second)[draws].mean(axis=1), [0.025, 0.975])
    assert middle == pytest.approx((first - second).mean())
    np.testing.assert_allclose([low, high], expected, atol=0.004)
    assert paired_bootstrap(first, second, seed=1) == (middle, low, high)
    assert paired_bootstrap(first, first) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="shapes"):
        paired_bootstrap(first, second[:5])
