"""Codes built from the CF model's vectors come after it.

Scorers, shards and the kept rewards then belong to those codes and no others.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.disk_cache import CachedRewards, cache_folder
from ilrec_dist.cf.rewards.index import write_code_order
from ilrec_dist.cf.rewards.token_rewards import TokenRewards, merge_shards
from ilrec_dist.cf.sasrec.checkpoint import item_vectors, load_cf
from ilrec_dist.common.errors import UserError
from ilrec_dist.items.build import build_catalogue
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.trie import Trie
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import execute, open_run
from tests.support.cf_world import CONFIG, World, copy_models, training_targets
from tests.support.tiny_run import tiny_config

FLAT = replace(CONFIG, reward_index="flat", reward_shards=2, epochs=1)


def from_own_vectors(
    world: World, cf: Path, levels: int, config: CFConfig = FLAT
) -> tuple[Catalogue, Trie]:
    folder = cf.parent / f"items-{levels}"
    build_catalogue(
        ItemsConfig(embedding="cf", levels=levels, codes_per_level=4, collisions="resolve"),
        world.dataset,
        folder,
        item_vectors(cf),
    )
    catalogue = Catalogue.load(folder)
    write_code_order(config, cf, catalogue)
    return catalogue, Trie(catalogue)


def test_each_shard_answers_for_its_own_codes(world: World, flat_cf: Path, tmp_path: Path) -> None:
    cf, targets = (
        copy_models(flat_cf, tmp_path / "cf"),
        training_targets(world.dataset, np.arange(30)),
    )
    with pytest.raises(
        UserError,
        match=r"made for no catalogue yet \(no code-order/manifest.json\); run `ilrec cf` and "
        "`ilrec index` first",
    ):
        world.rewards(cf=cf)
    catalogue, trie = from_own_vectors(world, cf, 2)
    parts = [
        TokenRewards.open(cf, world.dataset, catalogue, trie, shard).shard_rewards(*targets)
        for shard in range(2)
    ]
    assert sum(len(part.targets) for part in parts) == len(targets[0]) and sum(
        part.first_log_mass.shape[1] for part in parts
    ) == trie.num_nodes(1)
    np.testing.assert_allclose(
        merge_shards(parts),
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


def test_other_codes_take_nothing_from_the_first_ones(
    world: World, flat_cf: Path, tmp_path: Path
) -> None:
    cf, targets = (
        copy_models(flat_cf, tmp_path / "cf"),
        training_targets(world.dataset, np.arange(8)),
    )
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


def test_models_and_what_was_made_of_others_are_told_apart(
    world: World, flat_cf: Path, tmp_path: Path
) -> None:
    cf = copy_models(world.cf, tmp_path / "cf")
    shutil.copytree(flat_cf / "code-order", cf / "code-order")
    with pytest.raises(UserError, match="made of other models"):
        world.rewards(cf=cf)


def test_item_vectors_are_in_index_order_and_the_other_array_says_its_order(world: World) -> None:
    vectors, items = item_vectors(world.cf), world.catalogue.items
    model = load_cf(world.cf)
    assert np.array_equal(vectors, model.items.weight.detach().numpy())
    folder = world.cf / "code-order"
    assert "code order" in json.loads((folder / "manifest.json").read_text())["order"]
    in_code_order = np.load(folder / "item_embeddings.code-order.npy")
    assert np.array_equal(in_code_order, vectors[items]) and not np.array_equal(
        items, np.arange(len(items))
    )
    index = faiss.read_index(str(folder / "item_embeddings.code-order.faiss"))
    scores, ids = index.search(in_code_order[:5], 3)
    expected = np.sort(in_code_order[:5] @ in_code_order.T, axis=1)[:, ::-1][:, :3]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert ids.max() < world.dataset.num_items


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
