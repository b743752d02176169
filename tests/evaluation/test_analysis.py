"""The parts of `ilrec analyze` against slow, plain counts."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.evaluation import layer_agreement as layer_agreement_module
from ilrec_dist.evaluation.breakdown import group_gains, shared_tokens, user_splits
from ilrec_dist.evaluation.layer_agreement import layer_agreement
from ilrec_dist.evaluation.negatives_analysis import (
    candidates_but_target,
    is_below,
    negatives_of_rows,
    term_gradients,
)
from ilrec_dist.items.trie import Trie
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.reporting.analysis import analysis_grids
from ilrec_dist.samples.collate import Batch, BatchMaker
from ilrec_dist.samples.targets import ChosenTargets
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.toy_decoder import (
    MAX_HISTORY,
    NUM_ITEMS,
    UNTIED,
    toy_backbone,
    toy_catalogue,
    toy_data,
)

CONFIG = ObjectiveConfig(cpo_beta=0.8, cpd_mu=0.4, crr_lambda=0.3, num_intermediate_layers=1)


@pytest.fixture(scope="module")
def parallel() -> Iterator[ParallelState]:
    yield initialize_parallel(1, "cpu")
    destroy_parallel(process_group=True)


def validation_batch() -> Batch:
    data, catalogue = toy_data(), toy_catalogue()
    users = data.evaluated("validation")
    chosen = ChosenTargets.of_split(data, users, "validation", MAX_HISTORY)
    batch = BatchMaker(data, catalogue, Trie(catalogue), chosen).make(np.arange(len(users)), 1)
    items = catalogue.item_tokens(data.targets("validation", users)).ravel()
    np.testing.assert_array_equal(batch.targets, items)
    return batch


def objective_of(parallel: ParallelState) -> CrossLayerObjective:
    catalogue = toy_catalogue()
    backbone = toy_backbone(catalogue, UNTIED)
    return CrossLayerObjective.build(backbone, CONFIG, catalogue, parallel).eval()


def test_negatives_are_those_of_the_operator(parallel):
    objective, batch = objective_of(parallel), validation_batch()
    rewards = torch.zeros(len(batch.candidate_tokens))
    inputs = batch.model_inputs(parallel.device)
    rows = objective(*inputs, rewards=rewards, loss_scale=1.0).rows
    pairs = negatives_of_rows(objective, batch)
    counts = np.bincount(pairs.row, minlength=len(batch.rows))
    np.testing.assert_array_equal(counts, rows.num_negatives)
    others = candidates_but_target(batch)
    assert set(zip(pairs.row, pairs.token, strict=True)) <= set(
        zip(others.row, others.token, strict=True)
    )


def test_a_pair_is_below_a_list_where_an_item_of_it_continues_the_prefix_so():
    trie, batch, rng = Trie(toy_catalogue()), validation_batch(), np.random.default_rng(3)
    data = toy_data()
    items = data.targets("validation", data.evaluated("validation")).astype(np.int64)
    lists = rng.integers(-1, NUM_ITEMS, (len(items), 6))
    pairs = candidates_but_target(batch)
    tokens = trie.catalogue.item_tokens
    found = is_below(trie, items, pairs, lists)
    assert 0 < found.mean() < 1
    for row, token, below in zip(pairs.row, pairs.token, found, strict=True):
        target, p = divmod(row, trie.depth)
        own = [*tokens(items[target : target + 1])[0][:p], token]
        listed = [tokens(np.array([item]))[0][: p + 1] for item in lists[target] if item >= 0]
        assert below == any(own == path.tolist() for path in listed)


def test_gradients_of_terms_add_up_to_that_of_the_loss(parallel):
    objective, batch = objective_of(parallel), validation_batch()
    rewards = torch.rand(len(batch.candidate_tokens), generator=torch.Generator().manual_seed(1))
    whole, *parts = term_gradients(objective, batch, rewards, 3)
    assert objective.options.beta == 0.8 and len(parts) == 3
    assert whole["cross_entropy"] > 0 and all(whole[term] > 0 for term in ("cpo", "cpd", "crr"))
    nothing = ObjectiveConfig(cpo_beta=0.0, cpd_mu=0.4, crr_lambda=0.0, num_intermediate_layers=1)
    backbone, catalogue = objective.backbone, toy_catalogue()
    alone = CrossLayerObjective.build(backbone, nothing, catalogue, parallel).eval()
    result = term_gradients(alone, batch, None, 3)[0]
    assert result["cpo"] == result["crr"] == 0
    assert result["cpd"] == pytest.approx(whole["cpd"], rel=1e-4)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def agreement_here(mesh: Mesh) -> dict[int, np.ndarray]:
    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        backbone = toy_backbone(toy_catalogue(), UNTIED)
        found = layer_agreement(backbone, validation_batch(), parallel)
        return {layer: same.numpy() for layer, same in found.items()}
    finally:
        destroy_parallel()


@pytest.mark.slow
def test_agreement_is_that_of_the_best_candidates_for_any_tp():
    (found,) = run_distributed(agreement_here, 1, 1)
    assert list(found) == [1] and 0 < found[1].mean() < 1
    for other in run_distributed(agreement_here, 2, 2):
        np.testing.assert_array_equal(other[1], found[1])


@pytest.mark.parametrize("chunk", [1, 40, layer_agreement_module.CHUNK_ELEMENTS])
def test_agreement_of_every_layer_by_dense_logits(parallel, monkeypatch, chunk):
    monkeypatch.setattr(layer_agreement_module, "CHUNK_ELEMENTS", chunk)
    # More layers than colours of a chart, and than an objective takes by default.
    config = dataclasses.replace(UNTIED, num_layers=12)
    backbone, batch = toy_backbone(toy_catalogue(), config), validation_batch()
    same = layer_agreement(backbone, batch, parallel)
    assert list(same) == list(range(11, 0, -1))
    hidden = backbone(batch.tokens, batch.rows, 11)
    lists = batch.candidate_tokens.split(batch.candidate_indptr.diff().tolist())
    final, *best = [
        [int(one[row[one].argmax()]) for row, one in zip(logits, lists, strict=True)]
        for logits in (stream @ backbone.head_weight.T for stream in (hidden.final, *hidden.layers))
    ]
    shares = []
    for layer, tokens in zip(same.values(), best, strict=True):
        assert layer.tolist() == [a == b for a, b in zip(final, tokens, strict=True)]
        shares.append(float(layer.float().mean()))
    # The layers differ, so that one in the place of another would be seen.
    assert len(set(shares)) > 5


def test_the_agreement_of_layers_has_a_row_a_layer_in_the_order_of_their_numbers():
    positions = [
        {"position": p, "rows": 9} | {f"agreement/layer{n}": (n + p) / 100 for n in range(1, 30)}
        for p in range(2)
    ]
    analysis = {"method": "ilrec", "seed": 0, "positions": positions, "gains": []}
    _, grid = analysis_grids(analysis)
    assert list(grid.head) == ["layer", "position 1", "position 2"]
    assert [row[0] for row in grid.rows] == [str(n) for n in range(29, 0, -1)]
    assert list(grid.rows[0]) == ["29", "0.29", "0.3"]


def test_groups_of_users_cover_everybody_and_their_gains_are_the_whole_gain():
    catalogue, rng = toy_catalogue(), np.random.default_rng(5)
    targets = rng.integers(0, NUM_ITEMS, 400)
    popularity = np.where(np.arange(NUM_ITEMS) < 6, 0, rng.integers(1, 90, NUM_ITEMS))
    lengths = rng.integers(3, 40, 400)
    values, versus = rng.random(400), rng.random(400)
    splits = user_splits(targets, lengths, popularity, catalogue)
    assert len(splits[0].names) == 6 and len(splits[1].names) == 5
    gains = list(group_gains(splits, values, versus))
    for split in splits:
        own = [gain for gain in gains if gain.split == split.name]
        assert sum(gain.users for gain in own) == 400
        total = sum(gain.users * gain.difference for gain in own) / 400
        assert total == pytest.approx((values - versus).mean())
        assert all(gain.low <= gain.difference <= gain.high for gain in own)
    unseen = next(gain for gain in gains if "unseen" in gain.group)
    assert unseen.users == (targets < 6).sum()
    tokens = [tuple(row) for row in catalogue.item_tokens(np.arange(NUM_ITEMS))]
    expected = [tokens.count(own) > 1 for own in tokens]
    assert shared_tokens(catalogue).tolist() == expected
