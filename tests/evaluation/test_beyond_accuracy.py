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


def calibration(
    items: np.ndarray, p: np.ndarray, targets: list[int], tokens: np.ndarray, of_codes: bool
) -> float:
    facts = ItemFacts(np.ones(len(tokens), np.int64), tokens)
    return beyond_accuracy(predictions(items, np.log(p), targets), facts, of_codes)[
        "calibration_error"
    ]


def test_calibration_of_two_bins() -> None:
    # Places with p = .25 and .75; the first target is hit at .75, the second not at all.
    items, tokens = np.array([[4, 5], [4, 5]]), np.arange(10)[:, None]
    p = np.array([[0.75, 0.25], [0.75, 0.25]])
    # Bin .7–.8: |1.5 − 1|, bin .2–.3: |.5 − 0|, over four places.
    found = calibration(items, p, [4, 9], tokens, False)
    assert found == pytest.approx((0.5 + 0.5) / 4)
    # Three of four hit at .75 is calibrated, as is one of four at .25.
    items, p = np.repeat(items[:1], 4, axis=0), np.repeat(p[:1], 4, axis=0)
    assert calibration(items, p, [4, 4, 4, 5], tokens, False) == pytest.approx(0.0, abs=1e-7)
    assert calibration_error(items < 0, p, items < 0) == 0.0


def test_items_of_one_code_tuple_share_its_probability() -> None:
    items, tokens = np.array([[1, 2]]), np.array([[0, 0], [7, 5], [7, 5], [7, 6], [7, 5]])
    # Three items have the code of p = .75: one hit at .25 of two places, |.5 − 1| / 2.
    p = np.array([[0.75, 0.75]])
    assert calibration(items, p, [1], tokens, True) == pytest.approx(0.25)
    # Scores that are of items are not shared: |1.5 − 1| / 2, equal or not.
    assert calibration(items, p, [1], tokens, False) == pytest.approx(0.25)
    assert calibration(items, p, [3], tokens, True) == pytest.approx(0.25)
    assert calibration(items, p, [3], tokens, False) == pytest.approx(0.75)


@pytest.mark.parametrize("of_codes", [True, False])
def test_only_the_first_ten_places_count(of_codes: bool) -> None:
    items = np.arange(24).reshape(2, 12)
    facts = ItemFacts(np.ones(24, np.int64), np.arange(24)[:, None])
    scores = np.full((2, 12), np.log(0.125))
    # Places behind the tenth would be hits.
    figures = beyond_accuracy(predictions(items, scores, [0, 23]), facts, of_codes)
    assert figures == pytest.approx(
        {
            "coverage@10": 20 / 24,
            "gini@10": 4 / 24,
            "novelty@10": math.log2(24),
            "diversity@10": 1.0,
            "calibration_error": 0.125 - 1 / 20,
        }
    )
