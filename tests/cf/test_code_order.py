"""Codes that are built from the CF model's own vectors come after it: stores, shards and the kept rewards then belong to those codes and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.disk_cache import CachedRewards, cache_folder
from ilrec_dist.cf.rewards.index import write_code_order
from ilrec_dist.cf.rewards.token_rewards import TokenRewards, merge
from ilrec_dist.cf.sasrec.checkpoint import item_vectors
from ilrec_dist.cf.sasrec.cross_fit import train_cf
from ilrec_dist.common.errors import UserError
from ilrec_dist.items.build import build_index
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.trie import Trie
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import execute, open_run
from tests.cf.conftest import CONFIG, World, training_targets
from tests.training.conftest import tiny_config

FLAT = replace(CONFIG, reward_index="flat", reward_shards=2, epochs=1)


def from_own_vectors(
    world: World, cf: Path, levels: int, config: CFConfig = FLAT
) -> tuple[Catalogue, Trie]:
    folder = cf.parent / f"items-{levels}"
    build_index(
        ItemsConfig(embedding="cf", levels=levels, codes_per_level=4, collisions="resolve"),
        world.dataset,
        folder,
        item_vectors(cf),
    )
    catalogue = Catalogue.load(folder)
    write_code_order(config, cf, catalogue)
    return catalogue, Trie(catalogue)


def test_each_shard_answers_for_its_own_codes(world: World, tmp_path: Path) -> None:
    cf, targets = tmp_path / "cf", training_targets(world.dataset, np.arange(30))
    train_cf(FLAT, world.dataset, None, cf)
    with pytest.raises(
        UserError,
        match=r"made for no catalogue yet \(no code-order/manifest.json\); run `ilrec cf` and `ilrec index` first",
    ):
        world.rewards(cf=cf)
    catalogue, trie = from_own_vectors(world, cf, 2)
    parts = [
        TokenRewards.open(cf, world.dataset, catalogue, trie, shard).part(*targets)
        for shard in range(2)
    ]
    assert sum(len(part.own) for part in parts) == len(targets[0]) and sum(
        part.first.shape[1] for part in parts
    ) == trie.num_nodes(1)
    np.testing.assert_allclose(
        merge(parts),
        TokenRewards.open(cf, world.dataset, catalogue, trie).fetch(*targets),
        atol=1e-6,
    )
    with pytest.raises(UserError, match="no shard 2: written for 2"):
        TokenRewards.open(cf, world.dataset, catalogue, trie, 2)
    catalogue, trie = from_own_vectors(world, cf, 2, CONFIG)
    with pytest.raises(
        UserError, match="no shard 0: no index was written, the catalogue is scanned whole"
    ):
        TokenRewards.open(cf, world.dataset, catalogue, trie, 0)


def test_other_codes_take_nothing_from_the_first_ones(world: World, tmp_path: Path) -> None:
    cf, targets = tmp_path / "cf", training_targets(world.dataset, np.arange(8))
    train_cf(FLAT, world.dataset, None, cf)
    before = from_own_vectors(world, cf, 2)
    CachedRewards(
        TokenRewards.open(cf, world.dataset, *before),
        cache_folder(cf, world.dataset),
        world.dataset,
        before[1],
    ).fetch_async(*targets).result()
    after = from_own_vectors(world, cf, 3)
    with pytest.raises(UserError, match="made for another catalogue"):
        TokenRewards.open(cf, world.dataset, *before)
    source = TokenRewards.open(cf, world.dataset, *after)
    cached = CachedRewards(source, cache_folder(cf, world.dataset), world.dataset, after[1])
    assert (
        np.array_equal(cached.fetch_async(*targets).result(), source.fetch(*targets))
        and cached.meter.cached == 0
    )


def test_models_and_what_was_made_of_others_are_told_apart(world: World, tmp_path: Path) -> None:
    for seed, catalogue in ((0, world.catalogue), (1, None)):
        train_cf(
            replace(CONFIG, epochs=1, seed=seed), world.dataset, catalogue, tmp_path / str(seed)
        )
    (tmp_path / "0" / "code-order").rename(tmp_path / "1" / "code-order")
    with pytest.raises(UserError, match="made of other models"):
        world.rewards(cf=tmp_path / "1")


def test_the_stages_of_a_run_whose_codes_come_from_the_cf_model(tmp_path: Path) -> None:
    def config(**items: int):
        return tiny_config(
            tmp_path,
            items={"embedding": "cf", **items},
            cf={"reward_index": "flat", "reward_shards": 2},
        )

    with pytest.raises(UserError, match="stage prepare has not been made"):
        execute(config(), "cf")
    for stage in ("prepare", "cf", "index"):
        execute(config(), stage)
    artifacts = RunArtifacts(config())
    assert {
        path.name for path in (artifacts.folders.cf / "code-order" / "fold1").glob("index-*")
    } == {
        "index-0.faiss",
        "index-1.faiss",
    }
    TokenRewards.open(
        artifacts.folders.cf, artifacts.training, artifacts.catalogue, artifacts.trie, 1
    )
    models = (artifacts.folders.cf / "manifest.json").stat().st_mtime_ns
    other = config(levels=3)
    assert [
        name for name in ("prepare", "cf", "index", "rewards") if open_run(other).is_current(name)
    ] == ["prepare", "cf"]
    execute(other, "index")
    artifacts = RunArtifacts(other)
    assert (
        TokenRewards.open(
            artifacts.folders.cf, artifacts.training, artifacts.catalogue, artifacts.trie
        ).trie.depth
        == 3
    )
    assert (artifacts.folders.cf / "manifest.json").stat().st_mtime_ns == models
