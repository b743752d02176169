"""A tiny data set, its CF folder and its rewards, made once for all CF tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.cf.sasrec.cross_fit import train_cf
from ilrec_dist.data.config import DataConfig, SyntheticConfig
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.prepare import prepare
from ilrec_dist.items.catalogue import make_catalogue
from ilrec_dist.items.trie import Trie
from tests.support.cf_world import CONFIG, World


@pytest.fixture(scope="session")
def flat_cf(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CF folder of other models, of two shards with flat indexes; not changed."""
    out = tmp_path_factory.mktemp("flat") / "cf"
    config = replace(CONFIG, epochs=1, reward_index="flat", reward_shards=2)
    train_cf(config, world.dataset, world.catalogue, out)
    return out


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("cf")
    prepare(
        DataConfig(
            format="synthetic",
            synthetic=SyntheticConfig(users=120, items=60, categories=4, mean_length=9.0),
        ),
        root / "data",
    )
    dataset = load_dataset(root / "data")
    rng = np.random.default_rng(0)
    # 64 tuples: some items share one.
    catalogue = make_catalogue(rng.integers(0, 4, (dataset.num_items, 3)), [4, 4, 4])
    (root / "items").mkdir()
    catalogue.save(root / "items")
    trie = Trie(catalogue)
    trie.save(root / "items")
    report = train_cf(CONFIG, dataset, catalogue, root / "cf")
    return World(root / "data", root / "items", root / "cf", dataset, catalogue, trie, report)
