"""Measures beside accuracy against small cases that were computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ilrec_dist.evaluation.beyond_accuracy import (
    ItemFacts,
    beyond_accuracy,
    calibration_error,
    coverage,
    diversity,
    gini,
    novelty,
)
from ilrec_dist.evaluation.predictions import Predictions

LISTS = np.array([[0, 1, 2], [0, 1, -1], [0, -1, -1], [-1, -1, -1]])
NOBODY = np.full((3, 2), -1)


def predictions(items: np.ndarray, scores: np.ndarray, targets: list[int]) -> Predictions:
    users = np.arange(len(items))
    ties = np.zeros(len(items), np.int64)
    return Predictions(
        users,
        np.array(targets),
        items.astype(np.int32),
        scores.astype(np.float32),
        ties,
        ties + 1,
        True,
    )


def test_coverage_is_the_share_of_items_that_occur() -> None:
    assert coverage(LISTS, 5) == 3 / 5
    assert coverage(NOBODY, 5) == 0.0


def test_gini_of_the_counts_three_two_one_and_nothing() -> None:
    # Ascending counts 0, 1, 2, 3: (−3·0 − 1·1 + 1·2 + 3·3) / (4 · 6) = 10 / 24.
    assert gini(LISTS, 4) == pytest.approx(10 / 24)
    assert gini(np.array([[0, 1], [2, 3]]), 4) == 0.0
    assert gini(np.array([[2], [2], [2]]), 4) == pytest.approx(3 / 4)
    assert gini(NOBODY, 4) == 0.0


def test_novelty_is_the_mean_information_of_listed_places() -> None:
    # (pop + 1) / (12 + 4): p = 8/16, 4/16, 2/16, 2/16.
    popularity = np.array([7, 3, 1, 1])
    assert novelty(LISTS, popularity) == pytest.approx((3 * 1 + 2 * 2 + 1 * 3) / 6)
    assert novelty(np.array([[0]]), np.array([0, 4])) == pytest.approx(math.log2(6))
    assert novelty(NOBODY, popularity) == 0.0


def test_diversity_is_one_minus_the_shared_prefix_of_pairs() -> None:
    tokens = np.array([[1, 5, 8, 9], [1, 5, 7, 9], [2, 5, 8, 9], [1, 5, 8, 9]])
    # Items 0 and 1 share half of their tokens from the start, 2 shares none with either.
    assert diversity(np.array([[0, 1, 2]]), tokens) == pytest.approx((0.5 + 1 + 1) / 3)
    assert diversity(np.array([[0, 3]]), tokens) == 0.0
    # The mean over lists that have a pair.
    assert diversity(np.array([[0, 1], [0, 2], [1, -1]]), tokens) == pytest.approx((0.5 + 1) / 2)
    assert diversity(np.array([[0, -1]]), tokens) == 0.0


def test_calibration_of_two_bins() -> None:
    # Places with p = .25 and .75; the first target is hit at .75, the second not at all.
    items = np.array([[4, 5], [4, 5]])
    scores = np.log(np.array([[0.75, 0.25], [0.75, 0.25]]))
    # Bin .7–.8: |1.5 − 1|, bin .2–.3: |.5 − 0|, over four places.
    assert calibration_error(predictions(items, scores, [4, 9])) == pytest.approx((0.5 + 0.5) / 4)
    # Three of four hit at .75 is calibrated, as is one of four at .25.
    items, targets = np.repeat([[4, 5]], 4, axis=0), [4, 4, 4, 5]
    scores = np.repeat(scores[:1], 4, axis=0)
    assert calibration_error(predictions(items, scores, targets)) == pytest.approx(0.0, abs=1e-7)


def test_items_of_one_code_tuple_share_its_probability() -> None:
    items, scores = np.array([[4, 5]]), np.log(np.array([[0.5, 0.5]]))
    # Each has .25: one hit in the bin .2–.3 of two places, |.5 − 1| / 2.
    assert calibration_error(predictions(items, scores, [4])) == pytest.approx(0.25)


def test_only_the_first_ten_places_count_and_scores_that_are_no_log_p_have_no_calibration() -> None:
    items = np.arange(24).reshape(2, 12)
    facts = ItemFacts(np.ones(24, np.int64), np.arange(24)[:, None])
    figures = beyond_accuracy(predictions(items, np.zeros((2, 12)), [0, 1]), facts, False)
    assert figures == pytest.approx(
        {
            "coverage@10": 20 / 24,
            "gini@10": 4 / 24,
            "novelty@10": math.log2(24),
            "diversity@10": 1.0,
        }
    )
    assert "calibration_error" in beyond_accuracy(
        predictions(items, -np.ones((2, 12)), [0, 1]), facts, True
    )
