"""Candidates of a fusion: their union, exact
scores by every source, and the fused lists.
"""

from __future__ import annotations

import numpy as np
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.evaluation.baselines.counting import count_training, transition_scores
from ilrec_dist.evaluation.config import EvaluationConfig
from ilrec_dist.evaluation.fusion import FusionScores, log_of_counts
from ilrec_dist.evaluation.fusion_ranking import (
    FusedModel,
    FusionSource,
    fused_predictions,
    score_candidates,
    transitions_source,
)
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.evaluation.ranking import history_ranges, top_items
from ilrec_dist.inference.inputs import HistoryRanges, PlainSequences
from ilrec_dist.inference.trie_constraint import TrieConstraint
from ilrec_dist.items.trie import Trie
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.toy_decoder import (
    MAX_HISTORY,
    NUM_ITEMS,
    exhaustive_scores,
    toy_backbone,
    toy_catalogue,
    toy_data,
)

pytestmark = pytest.mark.slow

CANDIDATES, USERS = 4, np.arange(12)


def fixed_log_p() -> np.ndarray:
    values = np.random.default_rng(2).normal(size=(len(USERS), NUM_ITEMS))
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def beams() -> np.ndarray:
    items = np.stack([np.random.default_rng(u).permutation(NUM_ITEMS)[:3] for u in USERS])
    items[4, 1:] = -1
    return items


def score(mesh: Mesh, exclude_seen: bool, refused_rank: int | None = None) -> FusionScores:
    """A source may refuse what one rank asks for."""

    def by_table(_: HistoryRanges, rows: np.ndarray) -> np.ndarray:
        if mesh.rank == refused_rank:
            raise UserError("table: refused")
        return table[rows]

    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        dataset, catalogue, table = toy_data(), toy_catalogue(), fixed_log_p()
        return score_candidates(
            toy_backbone(catalogue).train(),
            TrieConstraint(Trie(catalogue)),
            history_ranges(dataset, USERS, "test"),
            beams(),
            [
                FusionSource("table", by_table),
                transitions_source(count_training(dataset)),
            ],
            num_candidates=CANDIDATES,
            batch_size=5,
            softmax_scope="valid_next",
            inputs=PlainSequences(catalogue, MAX_HISTORY),
            exclude_seen=exclude_seen,
            parallel=parallel,
        )
    finally:
        destroy_parallel()


def refusal(mesh: Mesh) -> str:
    with pytest.raises(UserError) as refused:
        score(mesh, True, refused_rank=1)
    return str(refused.value)


def by_definition(mesh: Mesh) -> np.ndarray:
    initialize_parallel(mesh.tp, "cpu")
    try:
        dataset, catalogue = toy_data(), toy_catalogue()
        backbone, trie = toy_backbone(catalogue), Trie(catalogue)
        histories = [dataset.sequence(user)[:-1][-MAX_HISTORY:] for user in USERS]
        return np.stack(
            [
                exhaustive_scores(backbone, catalogue, trie, history, "valid_next")
                for history in histories
            ]
        )
    finally:
        destroy_parallel()


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_candidates_and_their_scores_are_those_of_the_definition(exclude_seen: bool) -> None:
    (found,) = run_distributed(score, 1, 1, exclude_seen)
    (language_model,) = run_distributed(by_definition, 1, 1)
    dataset = toy_data()
    transitions = log_of_counts(transition_scores(count_training(dataset), dataset, USERS, "test"))
    tables = [language_model, fixed_log_p(), transitions]
    for row, user in enumerate(USERS):
        expected = {int(item) for item in beams()[row] if item >= 0}
        for table in tables[1:]:
            ranked = table[row : row + 1].copy()
            if exclude_seen:
                ranked[0, dataset.sequence(user)[:-1]] = -np.inf
            expected |= set(top_items(ranked, CANDIDATES)[0][0].tolist())
        listed = found.items[row] >= 0
        assert found.items[row, listed].tolist() == sorted(expected)
        for source, table in enumerate(tables):
            np.testing.assert_allclose(
                found.log_p[row, listed, source], table[row, sorted(expected)], atol=1e-4
            )
        assert (found.log_p[row, ~listed] == -np.inf).all()


def fuse(mesh: Mesh) -> tuple[np.ndarray, float, Predictions]:
    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        dataset, catalogue = toy_data(), toy_catalogue()
        # A source that knows every target of both splits at its first places.
        oracle = np.full((len(USERS), NUM_ITEMS), -9.0)
        for split in ("validation", "test"):
            oracle[USERS, dataset.targets(split, USERS)] = -0.7
        model = FusedModel(
            toy_backbone(catalogue),
            dataset,
            Trie(catalogue),
            [FusionSource("oracle", lambda _, rows: oracle[rows])],
            config=EvaluationConfig(beam=10, fusion_candidates=3),
            softmax_scope="all",
            inputs=PlainSequences(catalogue, MAX_HISTORY),
            parallel=parallel,
        )
        weights, ndcg = model.choose_weights(USERS)
        return weights, ndcg, model.predictions(weights, users=USERS)
    finally:
        destroy_parallel()


def test_a_model_is_fused_with_the_weights_that_validation_chooses() -> None:
    ((weights, ndcg, predictions),) = run_distributed(fuse, 1, 1)
    assert weights[1] > 0.5 and ndcg > 0.6
    assert weights.sum() == pytest.approx(1)
    # At test time the validation item is seen, so the oracle's first item is the target.
    assert predictions.metrics()["hit@1"] > 0.9
    assert predictions.users.tolist() == USERS.tolist()


def test_process_layouts_agree() -> None:
    (one,) = run_distributed(score, 1, 1, True)
    for other in (*run_distributed(score, 2, 2, True), *run_distributed(score, 2, 1, True)):
        assert np.array_equal(other.items, one.items)
        np.testing.assert_allclose(other.log_p, one.log_p, rtol=1e-4, atol=1e-4)


def test_what_one_rank_refuses_all_refuse() -> None:
    assert run_distributed(refusal, 2, 1, timeout=30) == ["table: refused"] * 2


def test_fused_lists_hold_the_best_candidates() -> None:
    (scores,) = run_distributed(score, 1, 1, True)
    weights = np.array([0.5, 0.3, 0.2])
    targets = toy_data().targets("test", USERS).astype(np.int64)
    predictions = fused_predictions(
        scores, weights, users=USERS, targets=targets, exclude_seen=True
    )
    for row, target in enumerate(targets):
        listed = scores.items[row] >= 0
        items, values = scores.items[row, listed], scores.log_p[row, listed] @ weights
        order = np.lexsort((items, -values))[:20]
        kept = predictions.items[row] >= 0
        assert predictions.items[row, kept].tolist() == items[order].tolist()
        np.testing.assert_allclose(predictions.scores[row, kept], values[order], rtol=1e-5)
        if target in items[order]:
            assert predictions.ranks.rank[row] == items[order].tolist().index(target)
