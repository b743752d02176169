"""Evaluation over users: batches, process
layouts, predictions as a file, empty lists.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.evaluation.baselines.table import BaselineInputs
from ilrec_dist.evaluation.config import EvaluationConfig
from ilrec_dist.evaluation.log_probabilities import log_softmax
from ilrec_dist.evaluation.metrics import METRICS
from ilrec_dist.evaluation.predictions import Predictions, recompute
from ilrec_dist.evaluation.ranking import (
    baseline_predictions,
    evaluate_model,
    evaluate_treatments,
    rank_all,
    top_items,
)
from ilrec_dist.inference.inputs import HistoryRanges, PlainSequences, Prefixes
from ilrec_dist.inference.ranker import ModelRanker
from ilrec_dist.items.catalogue import make_catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.toy_decoder import (
    MAX_HISTORY,
    NUM_ITEMS,
    TIED,
    UNTIED,
    dataset_of,
    exhaustive_scores,
    toy_backbone,
    toy_catalogue,
    toy_data,
)

pytestmark = pytest.mark.slow


def ranker(
    backbone: Backbone,
    inputs: PlainSequences,
    config: EvaluationConfig,
    scope: str,
    parallel: ParallelState,
) -> ModelRanker:
    return ModelRanker(
        backbone,
        Trie(inputs.catalogue),
        beam=config.beam,
        batch_size=config.batch_size,
        softmax_scope=scope,
        inputs=inputs,
        parallel=parallel,
    )


def evaluate(
    mesh: Mesh, config: EvaluationConfig, scope: str, tied: bool, split: str = "test"
) -> Predictions:
    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        catalogue, dataset = toy_catalogue(), toy_data()
        backbone = toy_backbone(catalogue, TIED if tied else UNTIED).train()
        told: list[tuple[int, int]] = []
        predictions = evaluate_model(
            ranker(backbone, PlainSequences(catalogue, MAX_HISTORY), config, scope, parallel),
            dataset,
            users=np.arange(dataset.num_users)[::-1],
            split=split,
            exclude_seen=config.exclude_seen,
            progress=lambda done, total: told.append((done, total)),
        )
        assert backbone.training and (not told or told[-1][0] == told[-1][1])
        return predictions
    finally:
        destroy_parallel()


def treatments_at_once(mesh: Mesh) -> tuple[list[Predictions], list[Predictions], list[int]]:
    """Both treatments of seen items from one reading, each
    alone, and the histories that each of the calls read.
    """
    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        catalogue, dataset, read = toy_catalogue(), toy_data(), []
        backbone = toy_backbone(catalogue)
        prefill = backbone.prefill

        def counted(tokens: torch.Tensor, lengths: torch.Tensor | None = None):
            read.append(len(tokens))
            return prefill(tokens, lengths)

        backbone.prefill = counted
        inputs = PlainSequences(catalogue, MAX_HISTORY)
        model = ranker(backbone, inputs, EvaluationConfig(), "valid_next", parallel)
        task = {"users": np.arange(dataset.num_users), "split": "test"}
        both = evaluate_treatments(model, dataset, [True, False], **task)
        at_once = sum(read)
        alone = [
            evaluate_model(model, dataset, **task, exclude_seen=exclude)
            for exclude in (True, False)
        ]
        return both, alone, [at_once, sum(read) - at_once]
    finally:
        destroy_parallel()


def exhaustive(mesh: Mesh, scope: str, split: str) -> np.ndarray:
    initialize_parallel(mesh.tp, "cpu")
    try:
        catalogue, dataset = toy_catalogue(), toy_data()
        backbone, trie = toy_backbone(catalogue), Trie(catalogue)
        last = 1 if split == "test" else 2
        histories = [
            dataset.sequence(user)[:-last][-MAX_HISTORY:] for user in range(dataset.num_users)
        ]
        return np.stack(
            [exhaustive_scores(backbone, catalogue, trie, history, scope) for history in histories]
        )
    finally:
        destroy_parallel()


def assert_same(found: Predictions, expected: Predictions) -> None:
    for name in ("users", "targets", "items", "tie_start", "tie_size"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_equals_full_ranking_by_exhaustive_scores(split: str, exclude_seen: bool) -> None:
    config = EvaluationConfig(beam=NUM_ITEMS, exclude_seen=exclude_seen, batch_size=4)
    (found,) = run_distributed(evaluate, 1, 1, config, "all", True, split)
    (scores,) = run_distributed(exhaustive, 1, 1, "all", split)
    dataset = toy_data()
    # The exhaustive scores of items that share a tuple differ in the last bits; rounding ties them.
    expected = rank_all(
        lambda users: np.round(scores[users], 6),
        dataset,
        log_p=log_softmax,
        users=np.arange(dataset.num_users),
        split=split,
        exclude_seen=exclude_seen,
    )
    assert found.metrics() == pytest.approx(expected.metrics())
    np.testing.assert_array_equal(found.items[:, :20], expected.items)
    assert found.metrics()["hit@10"] > 0


@pytest.mark.parametrize(("scope", "tied"), [("all", True), ("valid_next", False)])
def test_process_layouts_and_batches_agree(scope: str, tied: bool) -> None:
    config = EvaluationConfig(beam=8, batch_size=3)
    (one,) = run_distributed(evaluate, 1, 1, config, scope, tied)
    assert one.users.tolist() == list(range(len(one.users)))
    (alone,) = run_distributed(
        evaluate, 1, 1, dataclasses.replace(config, batch_size=1), scope, tied
    )
    tensor_parallel = run_distributed(evaluate, 2, 2, config, scope, tied)
    data_parallel = run_distributed(evaluate, 2, 1, config, scope, tied)
    for other in (alone, *tensor_parallel, *data_parallel):
        assert_same(other, one)
    # The ranks of a group agree to the bit.
    for name in ("items", "scores"):
        assert np.array_equal(getattr(tensor_parallel[0], name), getattr(tensor_parallel[1], name))


class RefusedInputs(PlainSequences):
    def prefixes(self, histories: HistoryRanges, rows: np.ndarray) -> Prefixes:
        raise UserError("a history of this rank")


def refused(mesh: Mesh) -> str:
    """What a rank says where the other one alone meets an error."""
    parallel = initialize_parallel(mesh.tp, "cpu", timeout_seconds=60)
    try:
        catalogue, dataset = toy_catalogue(), toy_data()
        inputs = RefusedInputs if parallel.dp_rank == 1 else PlainSequences
        with pytest.raises(UserError) as error:
            evaluate_model(
                ranker(
                    toy_backbone(catalogue, UNTIED),
                    inputs(catalogue, MAX_HISTORY),
                    EvaluationConfig(beam=8, batch_size=3),
                    "all",
                    parallel,
                ),
                dataset,
                users=np.arange(dataset.num_users),
                split="test",
                exclude_seen=True,
            )
        return str(error.value)
    finally:
        destroy_parallel()


def test_treatments_of_seen_items_share_what_the_model_has_read() -> None:
    for both, alone, read in run_distributed(treatments_at_once, 2, 2):
        assert read == [toy_data().num_users, 2 * toy_data().num_users]
        assert [predictions.exclude_seen for predictions in both] == [True, False]
        # Histories hold seen items that would be listed.
        assert (both[0].items[:, :10] != both[1].items[:, :10]).any()
        for found, expected in zip(both, alone, strict=True):
            assert (found.items == expected.items).all()
            assert (found.scores == expected.scores).all()
            assert (found.ranks.first == expected.ranks.first).all()


def test_no_rank_waits_for_one_that_is_refused() -> None:
    assert run_distributed(refused, 2, 1) == ["a history of this rank"] * 2


def test_predictions_as_a_file(tmp_path: Path) -> None:
    (predictions,) = run_distributed(evaluate, 1, 1, EvaluationConfig(beam=20), "all", True)
    path = tmp_path / "predictions.parquet"
    predictions.save(path, "this")
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.parquet"]
    assert recompute(path) == predictions.metrics()
    table = pq.read_table(path).to_pydict()
    ranks = [
        row.index(target) if target in row else None
        for row, target in zip(table["items"], table["target"], strict=True)
    ]
    assert (
        np.mean([rank is not None and rank < 10 for rank in ranks])
        == predictions.metrics()["hit@10"]
    )
    assert {
        len(scores) - len(items)
        for scores, items in zip(table["scores"], table["items"], strict=True)
    } == {0}
    assert_same(Predictions.load(path), predictions)
    row = predictions.row("sft", 3)
    assert (
        row["method"] == "sft"
        and row["seed"] == 3
        and row["users"] == 23
        and row["exclude_seen"] is True
    )
    assert {*METRICS, "ndcg@10_se", "expected_ndcg@10"} <= row.keys()

    pq.write_table(pa.table({"user": [1]}), path)
    with pytest.raises(UserError, match="expected the columns user, target, items"):
        Predictions.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        Predictions.load(tmp_path / "none.parquet")


def test_top_items_keep_item_order_among_equals() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (50, 30)).astype(np.float64)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[0] = -np.inf
    for k in (1, 7, 30, 99):
        for row, found in zip(scores, top_items(scores, k), strict=True):
            order = [
                item
                for item in sorted(range(30), key=lambda item: (-row[item], item))
                if row[item] > -np.inf
            ][:k]
            assert found[found >= 0].tolist() == order


def test_a_baseline_without_what_it_needs() -> None:
    with pytest.raises(ValueError, match="sasrec needs cf_folder"):
        baseline_predictions(
            "sasrec", BaselineInputs(toy_data(), "test"), users=np.arange(3), exclude_seen=True
        )


def evaluate_two_items(mesh: Mesh, sequences: list[list[int]], exclude_seen: bool) -> Predictions:
    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        catalogue = make_catalogue(np.array([[0, 0], [1, 0]]), (2, 2))
        return evaluate_model(
            ranker(
                toy_backbone(catalogue),
                PlainSequences(catalogue, MAX_HISTORY),
                EvaluationConfig(),
                "all",
                parallel,
            ),
            dataset_of(sequences, num_items=2),
            users=np.arange(len(sequences)),
            split="test",
            exclude_seen=exclude_seen,
        )
    finally:
        destroy_parallel()


# Histories at test time hold both items: a,a,a,a,b,a alone, and with a user to whom b is left.
@pytest.mark.parametrize(
    ("sequences", "without_items", "hits"),
    [
        ([[0, 0, 0, 0, 1, 0]], 1, 0),
        ([[0, 1, 0], [1, 0, 1], [0, 1, 1]], 3, 0),
        ([[0, 0, 0, 0, 1, 0], [0, 0, 0, 1]], 1, 1),
    ],
)
def test_users_with_nothing_left_count_as_misses_for_every_method(
    tmp_path: Path, sequences: list[list[int]], without_items: int, hits: int
) -> None:
    (beams,) = run_distributed(evaluate_two_items, 1, 1, sequences, True)
    dataset = dataset_of(sequences, num_items=2)
    users = np.arange(len(sequences))
    rankings = [beams] + [
        baseline_predictions(name, BaselineInputs(dataset, "test"), users=users, exclude_seen=True)
        for name in ("popularity", "transitions")
    ]
    for predictions in rankings:
        figures = predictions.metrics()
        assert figures["hit@10"] == figures["expected_ndcg@10"] == hits / len(sequences)
        assert predictions.row("m")["users_without_items"] == without_items
        predictions.save(tmp_path / "p.parquet", "")
        assert recompute(tmp_path / "p.parquet") == figures
        assert Predictions.load(tmp_path / "p.parquet").num_users_without_items == without_items
    (kept,) = run_distributed(evaluate_two_items, 1, 1, sequences, False)
    assert kept.metrics()["hit@10"] == 1 and kept.num_users_without_items == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_an_error_that_names_the_method(value: float) -> None:
    dataset = toy_data()
    scores = np.zeros((1, NUM_ITEMS))
    scores[0, 5] = value
    with pytest.raises(UserError, match="sasrec: its scores are not finite"):
        rank_all(
            lambda users: np.repeat(scores, len(users), axis=0),
            dataset,
            log_p=log_softmax,
            users=np.arange(3),
            split="test",
            exclude_seen=True,
            name="sasrec",
        )
