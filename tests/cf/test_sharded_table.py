"""The item table sharded over processes: the losses, ranks and models of one process.

All tests share the processes of one world size, which other tests of the suite start
too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ilrec_dist.cf.sasrec.checkpoint import load_cf, read_model, save_model
from ilrec_dist.cf.sasrec.cross_fit import train_cf
from ilrec_dist.cf.sasrec.fit import broadcast_gradients
from ilrec_dist.cf.sasrec.model import SASRec
from ilrec_dist.cf.sasrec.sharded_table import ItemShard, ItemTable, full_softmax_loss
from ilrec_dist.common.errors import UserError
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.cf_world import CONFIG, World

pytestmark = pytest.mark.slow

# Shards of 5 and 6 items.
ITEMS, WIDTH, ROWS = 23, 6, 40
WORLD_SIZE = 4


def whole_and_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(ITEMS, WIDTH), torch.randn(ROWS, WIDTH), torch.randint(0, ITEMS, (ROWS,))


def by_table(shard: ItemShard) -> dict[str, torch.Tensor]:
    """Lookup, loss, ranks and gradients, of a table whose equal rows make ties."""
    weight, hidden, targets = whole_and_rows()
    weight[9], weight[20] = weight[2], weight[2]
    targets[:3] = torch.tensor([2, 9, 20])
    table = ItemTable(shard, WIDTH, 1.0)
    table.weight.data = weight[shard.start : shard.stop].clone()
    hidden.requires_grad_()
    looked_up = table(targets)
    (
        full_softmax_loss(hidden, table.weight, targets, shard)
        + (looked_up * hidden.detach()).sum()
    ).backward()
    gradient = table.weight.grad.clone()
    # Products of small integers are exact in any order, so that equal rows are ties in every shard.
    table.weight.data.mul_(2).round_()
    rank = table.ranks(targets, table.logits((2 * hidden.detach()).round()))
    return {
        "vectors": looked_up.detach(),
        "hidden": hidden.grad,
        "weight": gradient,
        "rank": rank,
    }


def by_shard(mesh: Mesh) -> dict[str, torch.Tensor]:
    return by_table(ItemShard.of_process_group(ITEMS))


def test_lookup_loss_ranks_and_gradients() -> None:
    whole, parts = by_table(ItemShard(ITEMS)), run_distributed(by_shard, WORLD_SIZE, 1)
    weight, hidden, targets = whole_and_rows()
    for part in parts:
        assert torch.equal(part["vectors"], whole["vectors"]) and torch.equal(
            part["rank"], whole["rank"]
        )
        torch.testing.assert_close(part["hidden"], whole["hidden"])
    assert [len(part["weight"]) for part in parts] == [5, 6, 6, 6]
    torch.testing.assert_close(torch.cat([part["weight"] for part in parts]), whole["weight"])
    # Ties stand in item order.
    assert whole["rank"][:3].diff().tolist() != [0, 0]


@pytest.mark.parametrize(("items", "width"), [(1000, 64), (37, 3), (5, 2)])
def test_the_first_values_do_not_depend_on_the_parts(
    items: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(shard: ItemShard) -> SASRec:
        torch.manual_seed(4)
        return SASRec(shard, width, 1, 1, 0.0, 8)

    monkeypatch.setattr("ilrec_dist.cf.sasrec.sharded_table.DRAW_ELEMENTS", 160)
    whole, parts = drawn(ItemShard(items)), [drawn(ItemShard(items, part, 4)) for part in range(4)]
    assert torch.equal(torch.cat([part.items.weight for part in parts]), whole.items.weight)
    assert all(torch.equal(part.positions.weight, whole.positions.weight) for part in parts)
    assert 0.01 < float(whole.items.weight.detach().std()) < 0.04


@pytest.mark.parametrize("items", [37, 64])
def test_tensors_of_a_model_file_are_aligned_and_mapped(items: int, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = SASRec(
        ItemShard(items),
        CONFIG.hidden_size,
        CONFIG.num_layers,
        CONFIG.num_heads,
        0.0,
        CONFIG.max_history,
    )
    model.known[::3] = True
    save_model(tmp_path / "m.safetensors", model)
    read = read_model(tmp_path / "m.safetensors", CONFIG, ItemShard(items))
    assert all(value.data_ptr() % 4 == 0 for value in read.parameters())
    assert all(
        torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items()
    )
    library = load_file(tmp_path / "m.safetensors")
    assert library.keys() == model.state_dict().keys() and all(
        torch.equal(library[name], value) for name, value in model.state_dict().items()
    )


class Killed(BaseException):
    """As a signal would, in the middle."""


def train_a_shard(mesh: Mesh, data: str, out: str) -> dict[str, Any]:
    """Interrupted once, after the first model, of which nothing is trained again."""

    def kill(event: dict) -> None:
        if event["model"] == "fold0":
            raise Killed

    dataset = load_dataset(data)
    config, shard = replace(CONFIG, dropout=0.1), ItemShard.of_process_group(dataset.num_items)
    with pytest.raises(Killed):
        train_cf(config, dataset, None, out, kill, shard=shard)
    return train_cf(config, dataset, None, out, shard=shard)


def test_models_trained_in_shards_are_those_of_one_process(world: World, tmp_path: Path) -> None:
    whole = train_cf(replace(CONFIG, dropout=0.1), world.dataset, None, tmp_path / "whole")
    reports = run_distributed(
        train_a_shard, WORLD_SIZE, 1, str(world.data), str(tmp_path / "shards")
    )
    assert json.loads((tmp_path / "shards" / "report.json").read_text())["models"].keys() == {
        "full",
        "fold0",
        "fold1",
    }
    for name, report in whole["models"].items():
        for part in reports:
            for line, other in zip(report["curve"], part["models"][name]["curve"], strict=True):
                assert other["loss"] == pytest.approx(line["loss"], rel=1e-5) and other[
                    "ndcg@10"
                ] == pytest.approx(line["ndcg@10"], abs=0.01)
        one, other = load_cf(tmp_path / "whole", name), load_cf(tmp_path / "shards", name)
        assert torch.equal(one.known, other.known)
        moved = (
            (one.items.weight - SASRec.from_config(CONFIG, ItemShard(one.num_items)).items.weight)
            .detach()
            .abs()
            .mean()
        )
        for (key, value), (_, theirs) in zip(
            one.named_parameters(), other.named_parameters(), strict=True
        ):
            assert (value - theirs).detach().abs().mean() < 0.02 * moved, key
    for kind in ("in_fold", "cross_fitted", "validation"):
        for part in reports:
            assert part["log_p"][kind]["mean_log_p"] == pytest.approx(
                whole["log_p"][kind]["mean_log_p"], abs=1e-3
            )
    assert np.array_equal(
        np.load(tmp_path / "shards" / "folds.npy"), np.load(tmp_path / "whole" / "folds.npy")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "whole"]


def gradients_of_each(mesh: Mesh) -> list[list[float]]:
    parameters = [
        torch.nn.Parameter(torch.zeros(2, 2)),
        torch.nn.Parameter(torch.zeros(3)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    for number, parameter in enumerate(parameters[:2]):
        parameter.grad = torch.full_like(parameter, 10.0 * number + mesh.rank)
    broadcast_gradients(parameters, ItemShard.of_process_group(ITEMS))
    return [parameter.grad.flatten().tolist() for parameter in parameters[:2]]


def test_replicated_parameters_get_the_gradients_of_rank_0() -> None:
    ranks = run_distributed(gradients_of_each, WORLD_SIZE, 1)
    assert ranks == [[[0.0] * 4, [10.0] * 3]] * WORLD_SIZE


def refusals(mesh: Mesh, data: str, out: str) -> list[str]:
    with pytest.raises(UserError) as too_many:
        ItemShard.of_process_group(1)
    dataset = load_dataset(data)
    shard = ItemShard.of_process_group(dataset.num_items)
    with pytest.raises(UserError) as diverged:
        train_cf(replace(CONFIG, learning_rate=1e30), dataset, None, out, shard=shard)
    table = ItemTable(ItemShard.of_process_group(ITEMS), WIDTH, 1.0)
    logits = torch.zeros(3, len(table.weight))
    if mesh.rank == 1:
        logits[2, 0] = torch.nan
    with pytest.raises(FloatingPointError):
        table.ranks(torch.tensor([0, 1, 2]), logits)
    return [str(too_many.value), str(diverged.value)]


def test_refusals_come_out_of_every_process(world: World, tmp_path: Path) -> None:
    """More workers than items, a model that diverges, a score that is not finite."""
    ranks = run_distributed(refusals, WORLD_SIZE, 1, str(world.data), str(tmp_path / "cf"))
    assert all("cf.split_table: 4 workers for 1 items" in too_many for too_many, _ in ranks)
    assert all(diverged.startswith("CF model 'full' diverged in epoch 1") for _, diverged in ranks)
    assert not list(tmp_path.iterdir())
