"""Candidates of a fusion: their union, exact
scores by every source, and the fused lists.
"""

from __future__ import annotations

import numpy as np
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.evaluation.baselines.counting import count_training, transition_scores
from ilrec_dist.evaluation.fusion import FusionScores
from ilrec_dist.evaluation.fusion_ranking import (
    Fusions,
    FusionSource,
    Mixture,
    fused_predictions,
    score_candidates,
    transitions_source,
)
from ilrec_dist.evaluation.log_probabilities import log_of_counts, log_softmax
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.evaluation.ranking import history_ranges, top_items
from ilrec_dist.inference.inputs import HistoryRanges, PlainSequences
from ilrec_dist.inference.ranker import ModelRanker
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

CANDIDATES, BEAM, USERS = 4, 3, np.arange(12)


def fixed_log_p() -> np.ndarray:
    values = np.random.default_rng(2).normal(size=(len(USERS), NUM_ITEMS))
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def language_model(parallel: ParallelState, beam: int) -> ModelRanker:
    catalogue = toy_catalogue()
    return ModelRanker(
        toy_backbone(catalogue).train(),
        Trie(catalogue),
        beam=beam,
        batch_size=5,
        softmax_scope="valid_next",
        inputs=PlainSequences(catalogue, MAX_HISTORY),
        parallel=parallel,
    )


def beams(mesh: Mesh, exclude_seen: bool) -> np.ndarray:
    """int [n, W]: the items of the language model's own lists."""
    model = language_model(initialize_parallel(mesh.tp, "cpu"), BEAM)
    try:
        histories = history_ranges(toy_data(), USERS, "test")
        items = np.full((len(USERS), NUM_ITEMS), -1)
        for rows, ranked in model.rank(histories, top=1, exclude_seen=exclude_seen):
            items[rows, : ranked.items.shape[1]] = ranked.items
        return items
    finally:
        destroy_parallel()


def score(
    mesh: Mesh,
    exclude_seen: bool,
    refused_rank: int | None = None,
    sources: slice = slice(None),
) -> FusionScores:
    """A source may refuse what one rank asks for."""

    def by_table(_: HistoryRanges, rows: np.ndarray) -> np.ndarray:
        if mesh.rank == refused_rank:
            raise UserError("table: refused")
        return table[rows]

    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        dataset, table = toy_data(), fixed_log_p()
        all_sources = [
            FusionSource("table", by_table),
            transitions_source(count_training(dataset)),
        ]
        # The other treatment's candidates are scored too, and change nothing.
        scores = score_candidates(
            language_model(parallel, BEAM),
            history_ranges(dataset, USERS, "test"),
            all_sources[sources],
            top=BEAM,
            num_candidates=CANDIDATES,
            treatments=[exclude_seen, not exclude_seen],
        )
        return scores[0]
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
    (by_model,) = run_distributed(by_definition, 1, 1)
    (beam_items,) = run_distributed(beams, 1, 1, exclude_seen)
    dataset = toy_data()
    transitions = log_of_counts(transition_scores(count_training(dataset), dataset, USERS, "test"))
    tables = [by_model, fixed_log_p(), transitions]
    for row, user in enumerate(USERS):
        proposals = [{int(item) for item in beam_items[row] if item >= 0}]
        assert len(proposals[0]) >= BEAM
        for table in tables[1:]:
            ranked = table[row : row + 1].copy()
            if exclude_seen:
                ranked[0, dataset.sequence(user)[:-1]] = -np.inf
            proposals.append(set(top_items(ranked, CANDIDATES)[0].tolist()))
        expected = set().union(*proposals)
        listed = found.items[row] >= 0
        assert found.items[row, listed].tolist() == sorted(expected)
        for source, table in enumerate(tables):
            np.testing.assert_allclose(
                found.log_p[row, listed, source], table[row, sorted(expected)], atol=1e-4
            )
            proposed = found.items[row, found.proposed[row, :, source]]
            assert proposed.tolist() == sorted(proposals[source])
        assert (found.log_p[row, ~listed] == -np.inf).all()


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_a_smaller_fusion_is_what_it_is_without_the_larger_one(exclude_seen: bool) -> None:
    (found,) = run_distributed(score, 1, 1, exclude_seen)
    for source in (0, 1):
        own = slice(source, source + 1)
        (alone,) = run_distributed(score, 1, 1, exclude_seen, None, own)
        taken = found.of([0, 1 + source])
        for row in range(len(USERS)):
            mine, expected = taken.items[row] >= 0, alone.items[row] >= 0
            assert mine.sum() < (found.items[row] >= 0).sum()
            assert taken.items[row, mine].tolist() == alone.items[row, expected].tolist()
            np.testing.assert_allclose(
                taken.log_p[row, mine], alone.log_p[row, expected], rtol=1e-5
            )
            assert np.array_equal(taken.proposed[row, mine], alone.proposed[row, expected])


def fuse(mesh: Mesh) -> list[tuple[np.ndarray, float, Predictions]]:
    """With a source that knows the targets, one that knows nothing, and both."""
    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        dataset = toy_data()
        # A source that knows every target of both splits at its first places.
        oracle = np.full((len(USERS), NUM_ITEMS), -9.0)
        for split in ("validation", "test"):
            oracle[USERS, dataset.targets(split, USERS)] = -0.7
        model = Fusions(
            language_model(parallel, 10),
            dataset,
            [
                FusionSource("oracle", lambda _, rows: oracle[rows]),
                FusionSource("even", lambda _, rows: np.full_like(oracle, -4.0)[rows]),
            ],
            [Mixture(True, [0, 1]), Mixture(True, [0, 2]), Mixture(True, [0, 1, 2])],
            num_candidates=3,
        )
        chosen = model.choose_weights(USERS)
        predictions = model.predictions([weights for weights, _ in chosen], users=USERS)
        return [(*one, ranked) for one, ranked in zip(chosen, predictions, strict=True)]
    finally:
        destroy_parallel()


def test_a_model_is_fused_with_the_weights_that_validation_chooses() -> None:
    (fusions,) = run_distributed(fuse, 1, 1)
    (weights, ndcg, predictions), (_, least, others), (_, both, _) = fusions
    assert weights[1] > 0.5 and min(ndcg, both) > 0.6 > least
    for weights, _, ranked in fusions:
        assert weights.sum() == pytest.approx(1)
        assert ranked.users.tolist() == USERS.tolist()
    # At test time the validation item is seen, so the oracle's first item is the target.
    assert predictions.metrics()["hit@1"] > 0.9 > others.metrics()["hit@1"]


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
        log_p = log_softmax(values[None])[0]
        kept = predictions.items[row] >= 0
        assert predictions.items[row, kept].tolist() == items[order].tolist()
        np.testing.assert_allclose(predictions.scores[row, kept], log_p[order], rtol=1e-5)
        if target in items[order]:
            assert predictions.ranks.rank[row] == items[order].tolist().index(target)
