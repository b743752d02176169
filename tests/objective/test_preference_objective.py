"""log π of targets and negatives: by branches
as by whole sequences, and over any tp.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.items.vocabulary import NO_TOKEN
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.objective.config import ObjectiveConfig, PreferenceConfig
from ilrec_dist.objective.preference import DPO, PreferenceObjective, SoftmaxDPO
from ilrec_dist.samples.negatives import HardNegatives, UniformNegatives, hashed, in_history
from ilrec_dist.samples.preference_pairs import PreferenceBatchMaker
from ilrec_dist.samples.windows import training_windows
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.toy_decoder import (
    MAX_HISTORY,
    NUM_ITEMS,
    TIED,
    UNTIED,
    dataset_of,
    toy_backbone,
    toy_catalogue,
    toy_data,
    toy_titles,
)
from tests.support.whole_model import full_state_dict


@pytest.fixture(scope="module")
def parallel() -> Iterator[ParallelState]:
    yield initialize_parallel(1, "cpu")
    destroy_parallel(process_group=True)


def maker_of(catalogue: Catalogue, targets: str, negatives: int) -> PreferenceBatchMaker:
    data, trie = toy_data(), Trie(catalogue)
    windows = training_windows(data, MAX_HISTORY, targets)
    drawn = UniformNegatives(data, trie, negatives, seed=5)
    return PreferenceBatchMaker(data, catalogue, trie, windows, drawn)


def objective_of(
    catalogue: Catalogue,
    config: BackboneConfig,
    parallel: ParallelState,
    scope: str,
    loss: type = SoftmaxDPO,
) -> PreferenceObjective:
    settings = ObjectiveConfig(softmax_scope=scope)
    backbone = toy_backbone(catalogue, config)
    own = loss(PreferenceConfig(beta=0.5))
    return PreferenceObjective(backbone, settings, own, catalogue, parallel)


@torch.no_grad()
def log_pi_alone(
    backbone: Backbone, trie: Trie, history: np.ndarray, item: int, scope: str
) -> float:
    """Σ log p of one item after a history, by a
    forward pass of these tokens alone, in fp64.
    """
    catalogue = trie.catalogue
    tokens = [catalogue.item_tokens(items) for items in (history, np.array([item]))]
    before, own = (part[part != NO_TOKEN].astype(np.int64) for part in tokens)
    inputs = torch.from_numpy(np.concatenate([before, own[:-1]]))[None]
    rows = torch.arange(len(before) - 1, inputs.shape[1])
    logits = backbone(inputs, rows).final.double() @ backbone.head_weight.double().T
    total, node = 0.0, np.array([0])
    for p, token in enumerate(own):
        scoped = torch.arange(catalogue.vocab_size)
        if scope == "valid_next":
            scoped = torch.from_numpy(trie.children(p, node)[1])
        total += float(logits[p, token] - logits[p, scoped].logsumexp(0))
        node = trie.step(p, node, np.array([token]))
    return total


@pytest.mark.parametrize("scope", ["all", "valid_next"])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["learned", "rope"])
@pytest.mark.parametrize("form", ["all", "last", "titles"])
def test_scores_are_those_of_each_continuation_alone(parallel, form, config, scope):
    catalogue = toy_titles() if form == "titles" else toy_catalogue()
    maker = maker_of(catalogue, "all" if form == "all" else "last", 2)
    numbers = np.arange(8, 16)
    batch = maker.make(numbers, 1)
    assert batch.tokens.numel() <= len(numbers) * maker.num_tokens(numbers).max()
    objective = objective_of(catalogue, config, parallel, scope).eval()
    with torch.no_grad():
        scores = objective.scores(*batch.model_inputs(parallel.device))
    data, slices = maker.dataset, maker.windows.slices(numbers)
    items = data.items[data.offsets[batch.users] + batch.positions]
    negatives = maker.negatives.draw(batch.users, batch.positions, items)
    sequence = np.repeat(np.arange(len(slices)), slices.stop - slices.target)
    for t, (user, position) in enumerate(zip(batch.users, batch.positions, strict=True)):
        history = data.sequence(user)[slices.start[sequence[t]] : position]
        found = [scores.target[t].item(), *scores.negatives[t].tolist()]
        for value, item in zip(found, [items[t], *negatives[t]], strict=True):
            expected = log_pi_alone(objective.backbone, maker.trie, history, item, scope)
            assert value == pytest.approx(expected, abs=1e-4)
        assert scores.target_length[t] == catalogue.item_lengths(items[t : t + 1])[0]


def loss_and_gradients(mesh: Mesh, scope: str) -> tuple[float, dict[str, torch.Tensor]]:
    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        catalogue = toy_catalogue()
        objective = objective_of(catalogue, UNTIED, parallel, scope).eval()
        maker = maker_of(catalogue, "all", 3)
        batch = maker.make(np.arange(12), 1)
        output = objective(
            *batch.model_inputs(parallel.device), rewards=None, loss_scale=1 / len(batch.users)
        )
        output.loss.backward()
        with torch.no_grad():
            for parameter in objective.backbone.parameters():
                parameter.copy_(parameter.grad)
            gradients = full_state_dict(objective.backbone)
        return output.loss.item(), gradients
    finally:
        destroy_parallel()


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["all", "valid_next"])
def test_two_tensor_parallel_ranks_give_the_loss_and_gradients_of_one(scope):
    ((loss, expected),) = run_distributed(loss_and_gradients, 1, 1, scope)
    for other, gradients in run_distributed(loss_and_gradients, 2, 2, scope):
        assert other == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_without_windows_has_a_loss_of_nothing(parallel):
    objective = objective_of(toy_catalogue(), TIED, parallel, "all", DPO)
    batch = maker_of(toy_catalogue(), "all", 1).make(np.array([], np.int64), 5)
    output = objective(*batch.model_inputs(parallel.device), rewards=None, loss_scale=1.0)
    output.loss.backward()
    assert output.loss.item() == 0 and batch.num_tokens == 0


def test_branches_cost_their_own_tokens_alone():
    maker = maker_of(toy_catalogue(), "all", 3)
    numbers = np.arange(len(maker.windows))
    batch = maker.make(numbers, 1)
    slices, depth = maker.windows.slices(numbers), maker.catalogue.depth
    trunk = int((slices.lengths * depth - 1).sum())
    assert batch.num_tokens == trunk + slices.num_targets * 3 * (depth - 1)
    assert maker.num_rows(numbers) == slices.num_targets == len(batch.users)


# The negatives themselves


def all_targets() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data = toy_data()
    users = np.repeat(np.arange(data.num_users), data.lengths() - 1)
    positions = np.concatenate([np.arange(1, n) for n in data.lengths()])
    return users, positions, data.items[data.offsets[users] + positions]


def test_uniform_negatives_are_outside_the_history_distinct_and_functions_of_the_target():
    data, trie = toy_data(), Trie(toy_catalogue())
    users, positions, items = all_targets()
    negatives = UniformNegatives(data, trie, 4, seed=1)
    drawn = negatives.draw(users, positions, items)
    tokens = trie.catalogue.item_tokens
    for row, (user, position, item) in enumerate(zip(users, positions, items, strict=True)):
        assert not set(drawn[row]) & set(data.sequence(user)[:position].tolist())
        assert len(set(drawn[row])) == 4
        assert not (tokens(drawn[row]) == tokens(np.array([item]))).all(axis=1).any()
    order = np.random.default_rng(2).permutation(len(users))[:50]
    again = negatives.draw(users[order], positions[order], items[order])
    np.testing.assert_array_equal(again, drawn[order])
    assert (UniformNegatives(data, trie, 4, seed=2).draw(users, positions, items) != drawn).any()
    many = UniformNegatives(data, trie, 40, seed=3).draw(users, positions, items)
    counts = np.bincount(many.ravel(), minlength=NUM_ITEMS)
    # Items of a history are missing from few lists, so no item is far from the mean.
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


def test_where_the_history_holds_nearly_all_items_the_rest_is_found():
    data = dataset_of([list(range(NUM_ITEMS)), list(range(NUM_ITEMS))], NUM_ITEMS)
    trie = Trie(toy_catalogue())
    last = np.array([NUM_ITEMS - 1])
    negatives = UniformNegatives(data, trie, 3, seed=1)
    # Two items are left before the target: the third negative is any but the target.
    drawn = negatives.draw(np.array([0]), last - 2, data.items[last - 2])
    assert {NUM_ITEMS - 2, NUM_ITEMS - 1} <= set(drawn[0].tolist())
    assert NUM_ITEMS - 3 not in drawn[0]


def test_a_hard_negative_is_near_in_text_and_popular():
    data, trie = toy_data(), Trie(toy_catalogue())
    users, positions, items = all_targets()
    neighbours = (np.arange(NUM_ITEMS)[:, None] + np.arange(1, 9)) % NUM_ITEMS
    neighbours[:, -1] = -1
    popularity = np.where(np.arange(NUM_ITEMS) % 2, 50, 0)
    drawn = HardNegatives(data, trie, neighbours, popularity, seed=1).draw(users, positions, items)
    distance = (drawn[:, 0] - items) % NUM_ITEMS
    seen = in_history(data, users, positions, drawn)
    assert not seen.any() and (distance <= 7).mean() > 0.95
    assert (drawn % 2).mean() > 0.9


def test_hashes_are_spread_evenly():
    values = hashed(3, np.arange(20_000), 7).astype(float) / 2**64
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert abs(counts - 1000).max() < 150
