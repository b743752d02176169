"""Fusion: candidates, probabilities of the sources, weights on the simplex."""

from __future__ import annotations

import numpy as np
import pytest

from ilrec_dist.evaluation.fusion import (
    FusionScores,
    are_listed,
    candidate_union,
    choose_weights,
    fused_scores,
    ranks_of_fused,
    simplex,
)
from ilrec_dist.evaluation.metrics import UNRANKED, per_user


def test_the_union_has_every_item_once_in_order() -> None:
    rng = np.random.default_rng(0)
    lists = [rng.integers(-1, 12, (30, width)) for width in (5, 3, 7)]
    lists[0][0], lists[1][0], lists[2][0] = -1, -1, -1
    union = candidate_union(lists)
    for row, found in enumerate(union):
        expected = sorted({int(item) for one in lists for item in one[row]} - {-1})
        assert found[: len(expected)].tolist() == expected and (found[len(expected) :] == -1).all()


def test_items_are_listed_in_their_own_row_alone() -> None:
    rng = np.random.default_rng(1)
    items, lists = rng.integers(-1, 9, (40, 5)), rng.integers(-1, 12, (40, 3))
    for row, found in enumerate(are_listed(items, lists)):
        expected = [item >= 0 and item in lists[row] for item in items[row]]
        assert found.tolist() == expected


@pytest.mark.parametrize(("sources", "points"), [(1, 1), (2, 11), (3, 66)])
def test_the_simplex_in_steps_of_a_tenth(sources: int, points: int) -> None:
    grid = simplex(sources)
    assert len(grid) == len(np.unique(grid, axis=0)) == points
    np.testing.assert_allclose(grid.sum(axis=1), 1)
    assert (grid >= 0).all() and np.allclose(grid * 10, np.round(grid * 10))


def example(users: int = 40) -> tuple[FusionScores, np.ndarray]:
    rng = np.random.default_rng(3)
    items = np.stack([np.sort(rng.permutation(50)[:20]) for _ in range(users)])
    items[3, 15:] = -1
    log_p = np.where(items[..., None] >= 0, rng.normal(size=(users, 20, 3)), -np.inf)
    targets = items[np.arange(users), rng.integers(0, 15, users)]
    targets[5] = 99
    # Two sources know the target by half each.
    hit = items == targets[:, None]
    log_p[..., 0] += 2.0 * hit
    log_p[..., 1] += 2.0 * hit
    proposed = rng.random(log_p.shape) < 0.5
    proposed[..., 2] |= ~proposed.any(axis=2)
    return FusionScores(items, log_p, proposed & (items >= 0)[..., None]), targets


def test_scores_and_ranks_follow_the_formula() -> None:
    scores, targets = example()
    weights = np.array([0.3, 0.7, 0.0])
    fused, ranks = fused_scores(scores, weights), ranks_of_fused(scores, weights, targets)
    for row in range(len(targets)):
        real = scores.items[row] >= 0
        expected = scores.log_p[row, real] @ weights
        np.testing.assert_allclose(fused[row, real], expected)
        assert (fused[row, ~real] == -np.inf).all()
        order = scores.items[row, real][np.lexsort((scores.items[row, real], -expected))].tolist()
        target = targets[row]
        assert ranks.rank[row] == (order.index(target) if target in order else UNRANKED)


def test_some_sources_have_the_candidates_that_they_proposed() -> None:
    scores, targets = example()
    narrowed, weights = scores.of([0, 2]), np.array([0.4, 0.6])
    ranks = ranks_of_fused(narrowed, weights, targets)
    for row, target in enumerate(targets):
        kept = scores.proposed[row][:, [0, 2]].any(axis=1)
        items, log_p = scores.items[row, kept], scores.log_p[row, kept][:, [0, 2]]
        assert narrowed.items[row][narrowed.items[row] >= 0].tolist() == items.tolist()
        assert (narrowed.log_p[row, ~kept] == -np.inf).all()
        order = items[np.lexsort((items, -(log_p @ weights)))].tolist()
        assert ranks.rank[row] == (order.index(target) if target in order else UNRANKED)
    assert (narrowed.items < scores.items).any()


def test_the_chosen_weights_are_the_best_of_the_grid() -> None:
    scores, targets = example()
    weights, value = choose_weights(scores, targets)
    figures = {
        tuple(point): per_user(ranks_of_fused(scores, point, targets))["ndcg@10"].mean()
        for point in simplex(3)
    }
    assert value == max(figures.values()) == figures[tuple(weights)]
    alone = [figures[tuple(point)] for point in np.eye(3)]
    assert value > max(alone) and weights[2] < 0.5


def test_a_source_without_weight_has_no_say() -> None:
    items = np.array([[1, 2]])
    log_p = np.array([[[0.0, -np.inf], [-1.0, 0.0]]])
    scores = FusionScores(items, log_p, np.ones(log_p.shape, np.bool_))
    assert fused_scores(scores, np.array([1.0, 0.0])).tolist() == [[0.0, -1.0]]
