"""GRU4Rec and Caser: their formulas written
again, what they may see, and that they learn.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.common.errors import UserError
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.data.reversed import both_directions
from ilrec_dist.evaluation.baselines.fit import load_baseline, sequence_scores, train_baseline
from ilrec_dist.evaluation.baselines.sequence_models import MODELS, Caser, GRU4Rec

pytestmark = pytest.mark.slow

ITEMS, USERS, D = 12, 4, 8


def make(cls):
    torch.manual_seed(3)
    model = cls(CFConfig(hidden_size=D, dropout=0.5), ITEMS, USERS).eval()
    for parameter in model.parameters():
        # Small weights would hide what a formula leaves out.
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_gru4rec_is_the_recurrence_of_its_paper():
    model, history = make(GRU4Rec), [5, 2, 7, 7]
    input_weights, state_weights = model.gru.weight_ih_l0, model.gru.weight_hh_l0
    state = torch.zeros(D)
    for item in history:
        vector = model.items.weight[item] * D**0.5
        of_input, of_state = input_weights @ vector, state_weights @ state
        reset = torch.sigmoid(of_input[:D] + of_state[:D])
        update = torch.sigmoid(of_input[D : 2 * D] + of_state[D : 2 * D])
        candidate = torch.tanh(of_input[2 * D :] + reset * of_state[2 * D :])
        state = (1 - update) * candidate + update * state
    expected = model.items.weight @ (model.dense.weight @ state + model.dense.bias)
    query = model(torch.tensor([history]), torch.tensor([0]), torch.tensor([3]))
    torch.testing.assert_close(query[0] @ model.table.T, expected)


@pytest.mark.parametrize("history", [[5], [5, 2, 7], [1, 9, 5, 2, 7, 3, 4]])
def test_caser_is_the_convolutions_of_its_paper(history):
    model, user = make(Caser), 2
    # The image E: the latest five vectors, zeros before the first item.
    image = torch.zeros(5, D)
    for place, item in enumerate(reversed(history[-5:])):
        image[4 - place] = model.items.weight[item] * D**0.5
    parts = []
    for filters in model.horizontal:
        height = filters.kernel_size[0]
        for weight, bias in zip(filters.weight, filters.bias, strict=True):
            values = [
                torch.relu((weight.T * image[top : top + height]).sum() + bias)
                for top in range(5 - height + 1)
            ]
            parts.append(torch.stack(values).max())
    # o~: each vertical filter weighs the five vectors.
    for column in range(D):
        for weight, bias in zip(model.vertical.weight, model.vertical.bias, strict=True):
            parts.append((weight * image[:, column]).sum() + bias)
    z = torch.relu(model.dense.weight @ torch.stack(parts) + model.dense.bias)
    both = torch.cat([z, model.users.weight[user]])
    expected = model.output[:, :-1] @ both + model.output[:, -1]
    query = model(torch.tensor([history]), torch.tensor([user]), torch.tensor([len(history) - 1]))
    torch.testing.assert_close(query[0] @ model.table.T, expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_query_has_seen_the_items_up_to_it_alone(name):
    model = make(MODELS[name])
    one = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    other = torch.tensor([[1, 2, 3, 9, 9, 9], [6, 5, 4, 3, 2, 1]])
    users = torch.tensor([0, 1])
    first, second = (model(items, users, torch.arange(12)) for items in (one, other))
    same = (first == second).all(dim=1)
    assert same[:3].all() and same[6:].all() and not same[3:6].any()


def cycle(num_users: int = 60, length: int = 9) -> InteractionDataset:
    """Each item is followed by the next one, from a start that differs by user."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, ITEMS, num_users)
    items = (starts[:, None] + np.arange(length)) % ITEMS
    return InteractionDataset(
        items.ravel().astype(np.int32),
        np.arange(num_users + 1) * length,
        [f"u{user}" for user in range(num_users)],
        [f"i{item}" for item in range(ITEMS)],
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns_what_follows_and_its_folder_gives_the_same_scores(name, tmp_path):
    dataset, config = cycle(), CFConfig(hidden_size=16, epochs=40, learning_rate=1e-2, batch_size=8)
    report = train_baseline(name, config, dataset, dataset, tmp_path / "m")
    assert report["validation_ndcg@10"] > 0.95
    assert report["curve"][-1]["epoch"] - report["best_epoch"] <= config.patience
    model, max_history = load_baseline(tmp_path / "m")
    users = dataset.evaluated("test")
    scores = sequence_scores(model, dataset, users, "test", max_history)
    assert (scores.argmax(axis=1) == dataset.targets("test")).mean() > 0.9
    # What stands after the history is not read.
    other = dataclasses.replace(dataset, items=dataset.items.copy())
    other.items[other.offsets[1:] - 1] = 0
    other.items[other.offsets[1:] - 2] = 0
    np.testing.assert_array_equal(
        sequence_scores(model, other, users, "validation", max_history),
        sequence_scores(model, dataset, users, "validation", max_history),
    )
    train_baseline(name, config, dataset, dataset, tmp_path / "again")
    again, _ = load_baseline(tmp_path / "again")
    assert torch.equal(again.table, model.table)


def test_backwards_sequences_train_and_divergence_is_refused(tmp_path):
    dataset, config = cycle(), CFConfig(hidden_size=8, epochs=1)
    train_baseline("caser", config, both_directions(dataset), dataset, tmp_path / "both")
    model, _ = load_baseline(tmp_path / "both")
    assert model.users.num_embeddings == dataset.num_users
    hot = CFConfig(hidden_size=8, epochs=3, learning_rate=1e30)
    with pytest.raises(UserError, match="baseline gru4rec diverged in epoch 1"):
        train_baseline("gru4rec", hot, dataset, dataset, tmp_path / "hot")
    assert not (tmp_path / "hot").exists()
