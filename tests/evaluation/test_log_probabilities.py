"""Log probabilities of items: their sums, and
that no list changes its order or its ties.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilrec_dist.evaluation.baselines.counting import count_training
from ilrec_dist.evaluation.baselines.table import BASELINES, BaselineInputs
from ilrec_dist.evaluation.beyond_accuracy import ItemFacts, beyond_accuracy
from ilrec_dist.evaluation.fusion import FusionScores, fused_scores
from ilrec_dist.evaluation.fusion_ranking import fused_lists
from ilrec_dist.evaluation.log_probabilities import (
    LogP,
    listed_log_p,
    log_of_counts,
    log_of_probabilities,
    log_softmax,
)
from ilrec_dist.evaluation.metrics import ranks_of_scores
from ilrec_dist.evaluation.predictions import Predictions, join_predictions
from ilrec_dist.evaluation.ranking import baseline_predictions, rank_all
from tests.support.toy_decoder import dataset_of, toy_data

NUM_ITEMS = 15


def test_probabilities_over_the_catalogue() -> None:
    logits = np.array([[0.0, np.log(3.0), 800.0 - 800.0]])
    np.testing.assert_allclose(np.exp(log_softmax(logits)), [[0.2, 0.6, 0.2]])
    assert np.isfinite(log_softmax(np.array([[1e4, -1e4]], np.float32))).all()
    # Counts 1, 0, 0, 2 with 1/4 each added, of 4 in all.
    np.testing.assert_allclose(
        np.exp(log_of_counts(np.array([[1.0, 0, 0, 2]]))),
        [[1.25 / 4, 0.25 / 4, 0.25 / 4, 2.25 / 4]],
    )
    found = log_of_probabilities(np.array([[0.25, 0.0, 0.75]], np.float32))
    assert found[0, 1] == -np.inf and np.exp(found).tolist() == [[0.25, 0.0, 0.75]]


# Few values, of which many differ by the last bits of a float32 or less.
near = st.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1.0 + 2**-52, 1.0 + 2**-23, 3.0, 3.0 + 2**-22])


@given(
    scores=st.lists(st.lists(near, min_size=9, max_size=9), min_size=1, max_size=4),
    as_float32=st.booleans(),
    log_p=st.sampled_from([log_softmax, log_of_counts, log_of_probabilities]),
)
def test_lists_keep_the_order_and_the_ties_of_the_scores(
    scores: list[list[float]], as_float32: bool, log_p: LogP
) -> None:
    values = np.array(scores, np.float32 if as_float32 else np.float64)
    order = np.argsort(-values, axis=1, kind="stable").astype(np.int32)
    columns = np.concatenate([order, np.full((len(order), 1), -1, np.int32)], axis=1)
    all_log_p = log_p(values)
    listed = listed_log_p(columns, values, all_log_p)
    assert listed.dtype == np.float32 and (listed[:, -1] == -np.inf).all()
    sorted_scores = np.take_along_axis(values, order, axis=1)
    sorted_log_p = np.take_along_axis(all_log_p, order, axis=1)
    finite = np.isfinite(sorted_log_p)
    is_tied = sorted_scores[:, 1:] == sorted_scores[:, :-1]
    assert ((listed[:, 1:-1] == listed[:, :-2]) == is_tied).all()
    assert ((listed[:, 1:-1] < listed[:, :-2]) == ~is_tied).all()
    np.testing.assert_allclose(listed[:, :-1][finite], sorted_log_p[finite], rtol=2e-6, atol=2e-6)


def history_and_target(users: int, targets: np.ndarray) -> list[list[int]]:
    return [[user % 3, 3 + user % 2, int(targets[user])] for user in range(users)]


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("log_p", [log_softmax, log_of_counts])
def test_a_full_ranking_ranks_by_the_scores(log_p: LogP, exclude_seen: bool) -> None:
    """By their bits: scores that log p in float32 does not tell apart are no ties."""
    rng = np.random.default_rng(2)
    users = 60
    sequences = history_and_target(users, rng.integers(0, NUM_ITEMS, users))
    dataset = dataset_of(sequences, NUM_ITEMS)
    scores = (1.0 + rng.integers(0, 6, (users, NUM_ITEMS)) * 2.0**-23).astype(np.float32)
    found = rank_all(
        lambda batch: scores[batch],
        dataset,
        log_p=log_p,
        users=np.arange(users),
        split="test",
        exclude_seen=exclude_seen,
    )
    left = scores.copy()
    if exclude_seen:
        for user, sequence in enumerate(sequences):
            left[user, sequence[:2]] = -np.inf
    ranks = ranks_of_scores(left, found.targets)
    assert np.array_equal(found.tie_start, ranks.first)
    assert np.array_equal(found.tie_size, ranks.tied)
    for row, items, listed in zip(left, found.items, found.scores, strict=True):
        items = items[items >= 0]
        expected = sorted(np.flatnonzero(row > -np.inf), key=lambda item: (-row[item], item))
        assert items.tolist() == expected
        assert np.array_equal(np.diff(listed[: len(items)]) < 0, np.diff(row[items]) < 0)
    total = np.exp(found.scores.astype(np.float64)).sum(axis=1)
    # What seen items have is not given to the others.
    assert (total < 0.95).all() if exclude_seen else np.allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize("name", ["popularity", "transitions"])
def test_counting_gives_probabilities_of_all_items(name: str) -> None:
    dataset = dataset_of([[0, 1, 2, 3], [1, 2, 3, 0], [5, 1, 0, 2], [4, 6, 2, 0]], 8)
    inputs = BaselineInputs(dataset, "test")
    users = np.arange(4)
    found = baseline_predictions(name, inputs, users=users, exclude_seen=False)
    scores = np.array(BASELINES[name].make_scorer(inputs)(users))
    assert (scores == 0).any() and np.isfinite(found.scores).all()
    expected = scores + 1 / 8
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        np.exp(found.scores), np.take_along_axis(expected, found.items, axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(np.exp(found.scores).sum(axis=1), 1, rtol=1e-5)


def test_fused_lists_are_normalised_over_their_candidates() -> None:
    rng = np.random.default_rng(4)
    items = np.sort(rng.permuted(np.tile(np.arange(30), (6, 1)), axis=1)[:, :12], axis=1)
    items[1, 5:], items[2] = -1, -1
    log_p = np.where(items[..., None] >= 0, np.log(rng.random((6, 12, 2))), -np.inf)
    scores = FusionScores(items, log_p, np.ones(log_p.shape, bool))
    weights = np.array([0.7, 0.3])
    found, listed = fused_lists(scores, weights, 12)
    assert (found[2] == -1).all() and (listed[2] == -np.inf).all()
    total = np.exp(listed.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(np.delete(total, 2), 1, rtol=1e-5)
    assert total[2] == 0
    # The first of them alone have the same probabilities as among all.
    first, part = fused_lists(scores, weights, 4)
    assert np.array_equal(first, found[:, :4]) and np.array_equal(part, listed[:, :4])
    best = fused_scores(scores, weights).argmax(axis=1)
    assert np.array_equal(found[:, 0], items[np.arange(6), best])


def drawn(users: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distributions of each user, float32 [users, NUM_ITEMS], and an item drawn of
    each.
    """
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(NUM_ITEMS, 0.3), users)
    targets = (p.cumsum(axis=1) > rng.random((users, 1))).argmax(axis=1)
    return p.astype(np.float32), targets


def calibration(scores: np.ndarray, targets: np.ndarray, log_p: LogP) -> float:
    users = len(scores)
    predictions = rank_all(
        lambda batch: scores[batch],
        dataset_of(history_and_target(users, targets), NUM_ITEMS),
        log_p=log_p,
        users=np.arange(users),
        split="test",
        exclude_seen=False,
    )
    facts = ItemFacts(np.ones(NUM_ITEMS, np.int64), np.arange(NUM_ITEMS)[:, None])
    return beyond_accuracy(predictions, facts, scores_are_of_codes=False)["calibration_error"]


def test_what_targets_are_drawn_from_is_calibrated_and_what_is_distorted_is_not() -> None:
    p, targets = drawn(20_000, seed=7)
    assert calibration(p, targets, log_of_probabilities) < 0.004
    logits = np.log(np.maximum(p, 1e-30))
    # Logits are up to a constant of each user.
    shift = np.random.default_rng(8).normal(0, 5, (len(p), 1)).astype(np.float32)
    assert calibration(logits + shift, targets, log_softmax) < 0.004
    assert calibration(0.5 * logits, targets, log_softmax) > 0.03
    assert calibration(3.0 * logits, targets, log_softmax) > 0.03
    assert calibration(p, targets, log_softmax) > 0.03


def test_files_with_other_scores_have_no_calibration(tmp_path: Path) -> None:
    """As those have that were saved before all scores were log p."""
    dataset = toy_data()
    file, joined = tmp_path / "a.parquet", tmp_path / "joined.parquet"
    baseline_predictions(
        "popularity", BaselineInputs(dataset, "test"), users=np.arange(5), exclude_seen=True
    ).save(file, "weights")
    join_predictions([file], joined)
    facts = ItemFacts(count_training(dataset).popularity, np.zeros((dataset.num_items, 1)))
    assert "calibration_error" in beyond_accuracy(Predictions.load(joined), facts, False)
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({"exclude_seen": "true"}), file)
    older = Predictions.load(file)
    assert len(older.users) == 5 and older.exclude_seen
    assert "calibration_error" not in beyond_accuracy(older, facts, False)
    # The scores of language models have always been log p.
    assert "calibration_error" in beyond_accuracy(older, facts, True)
