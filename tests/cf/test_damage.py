"""Damaged files and numbers that are not finite are refused by name, where
they arise.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ilrec_dist.cf.rewards.token_rewards import TokenRewards
from ilrec_dist.cf.sasrec import checkpoint
from ilrec_dist.cf.sasrec.checkpoint import (
    item_vectors,
    load_cf,
    load_folds,
    read_report,
    save_model,
    write_cf_manifest,
)
from ilrec_dist.cf.sasrec.cross_fit import train_cf
from ilrec_dist.cf.sasrec.sharded_table import ItemShard, ItemTable
from ilrec_dist.common import manifest
from ilrec_dist.common.errors import UserError
from tests.support.cf_world import CONFIG, World, copy_models, flip_last_byte, training_targets


def files_that_are_read(cf: Path) -> list[str]:
    """All files of a CF folder's manifests but the vectors that no command reads."""
    names = list(json.loads((cf / "manifest.json").read_text())["files"])
    code_order = json.loads((cf / "code-order" / "manifest.json").read_text())["files"]
    names += [f"code-order/{name}" for name in code_order]
    return [name for name in names if "item_embeddings" not in name]


def read_everything(world: World, cf: Path) -> None:
    load_cf(cf)
    item_vectors(cf)
    load_folds(cf)
    read_report(cf)
    world.rewards(cf=cf)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_last_byte, truncate, Path.unlink])
def test_every_file_that_is_read_is_checked(
    world: World, flat_cf: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    cf = Path(shutil.copytree(flat_cf, tmp_path / "cf"))
    names = files_that_are_read(cf)
    assert {"full.safetensors", "fold1.safetensors", "folds.npy", "report.json"} <= set(names)
    assert {"index-0.faiss", "vectors.npy", "known.npy", "shards.npy", "moments-1.npz"} <= {
        Path(name).name for name in names
    }
    read_everything(world, cf)
    for name in names:
        damage(cf / name)
        with pytest.raises(UserError) as error:
            read_everything(world, cf)
        what = "missing" if damage is Path.unlink else "damaged"
        assert str(error.value).startswith(f"{cf / name}: {what}") and "\n" not in str(error.value)
        assert "run `ilrec cf` again" in str(error.value)
        shutil.copy2(flat_cf / name, cf / name)
    read_everything(world, cf)


def test_files_are_hashed_once_a_process(
    world: World, flat_cf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cf, hashed = Path(shutil.copytree(flat_cf, tmp_path / "cf")), []
    sha256_file = manifest.sha256_file
    monkeypatch.setattr(
        manifest, "sha256_file", lambda path: hashed.append(path) or sha256_file(path)
    )
    read_everything(world, cf)
    read_everything(world, cf)
    counts = {path: hashed.count(path) for path in hashed}
    assert set(counts.values()) == {1} and len(counts) == len(files_that_are_read(cf))


@pytest.mark.parametrize("learning_rate", [1e30, 1e38])
def test_a_training_that_diverges_is_one_error(
    world: World, tmp_path: Path, learning_rate: float
) -> None:
    events: list[dict] = []
    with pytest.raises(UserError) as error:
        train_cf(
            replace(CONFIG, learning_rate=learning_rate),
            world.dataset,
            world.catalogue,
            tmp_path / "cf",
            events.append,
        )
    message = str(error.value)
    assert message.startswith("CF model 'full' diverged in epoch 1 (loss ")
    assert "lower cf.learning_rate" in message and "\n" not in message
    assert not events and not list(tmp_path.iterdir())


def test_a_training_that_diverges_after_its_first_epoch_names_the_epoch(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are poisoned after epoch 1, as one step that is too long would."""

    def poison(event: dict) -> None:
        if event["epoch"] == 1:
            for value in models[-1].parameters():
                value.data.fill_(math.nan)

    models = []
    built = checkpoint.SASRec.from_config
    monkeypatch.setattr(
        checkpoint.SASRec,
        "from_config",
        lambda *arguments: models.append(built(*arguments)) or models[-1],
    )
    with pytest.raises(UserError, match=r"CF model 'full' diverged in epoch 2 \(loss "):
        train_cf(CONFIG, world.dataset, None, tmp_path / "cf", poison)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_no_rank(value: float) -> None:
    table = ItemTable(ItemShard(6), 3, 1.0)
    logits, targets = torch.zeros(4, 6), torch.tensor([0, 1, 2, 3])
    assert table.ranks(targets, logits).tolist() == [0, 1, 2, 3]
    logits[2, 5] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        table.ranks(targets, logits)


@pytest.mark.parametrize("name", ["items.weight", "norm.weight"])
def test_weights_that_are_not_finite_are_refused_at_load(
    world: World, tmp_path: Path, name: str
) -> None:
    cf = copy_models(world.cf, tmp_path / "cf")
    entries = json.loads((cf / "manifest.json").read_text())
    # A copy in memory: the model that was loaded is mapped from the file that is overwritten.
    model = copy.deepcopy(load_cf(cf))
    dict(model.named_parameters())[name].data.view(-1)[1] = math.nan
    for file in ("full", "fold0"):
        save_model(cf / f"{file}.safetensors", model)
    (cf / "manifest.json").unlink()
    write_cf_manifest(cf, {key: entries[key] for key in ("config", "items", "data")})
    for file in ("full", "fold0"):
        with pytest.raises(UserError, match=f"{file}.safetensors: holds numbers .* not finite"):
            load_cf(cf, file)
    if name == "items.weight":
        with pytest.raises(UserError, match="full.safetensors: holds numbers"):
            item_vectors(cf)


@pytest.mark.parametrize("large", [False, True])
def test_rewards_that_are_not_finite_are_refused(world: World, flat_cf: Path, large: bool) -> None:
    """Not reached through files, which are refused at load."""
    rewards = world.rewards(cf=flat_cf if large else None)
    users, positions = training_targets(world.dataset, np.arange(5))
    assert np.isfinite(rewards.fetch(users, positions)).all()
    for model in rewards.models:
        model.norm.weight.data[0] = math.nan
    fresh = TokenRewards(
        rewards.models,
        rewards.folds,
        world.dataset,
        world.catalogue,
        world.trie,
        rewards.scorers,
    )
    with pytest.raises(
        UserError, match="token rewards are not finite, so CF model 'fold[01]' has diverged"
    ):
        fresh.fetch(users, positions)
