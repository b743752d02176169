"""Large catalogues: top items and cell moments against the full scan, and shards."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.ann import (
    build_ann_index,
    load_ann_index,
    save_ann_index,
    search_ann_index,
)
from ilrec_dist.cf.rewards.cell_moments import cell_moments, log_masses
from ilrec_dist.cf.rewards.index import index_kind, write_code_order
from ilrec_dist.cf.rewards.item_scorer import read_scorer, shard_nodes, write_scorer
from ilrec_dist.cf.rewards.prefix_mass import RewardOptions
from ilrec_dist.cf.rewards.token_rewards import TokenRewards, merge_shards
from ilrec_dist.cf.sasrec.model import SASRec
from ilrec_dist.cf.sasrec.sharded_table import ItemShard
from ilrec_dist.common.errors import UserError
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue, make_catalogue
from ilrec_dist.items.trie import Trie
from tests.support.cf_world import CONFIG, World, copy_models, training_targets

ITEMS, WIDTH, LIMIT = 6000, 16, 200


@dataclass(frozen=True)
class Large:
    dataset: InteractionDataset
    catalogue: Catalogue
    trie: Trie
    models: list[SASRec]
    exact: TokenRewards
    targets: tuple[np.ndarray, np.ndarray]

    def rewards(
        self, folder: Path, options: RewardOptions, shard: int | None = None
    ) -> TokenRewards:
        scorers = [read_scorer(folder / f"fold{k}", self.trie, shard) for k in range(2)]
        return TokenRewards(
            self.models,
            self.exact.folds,
            self.dataset,
            self.catalogue,
            self.trie,
            scorers,
            options,
        )


@pytest.fixture(scope="module")
def large() -> Large:
    """Item vectors that cluster by code, and two models that do not know some items."""
    rng = np.random.default_rng(0)
    codes = np.stack(
        [
            rng.choice(8, ITEMS, p=np.r_[0.4, [0.6 / 7] * 7]),
            rng.integers(0, 8, ITEMS),
            rng.integers(0, 256, ITEMS),
        ],
        axis=1,
    )
    catalogue = make_catalogue(codes, [8, 8, 256])
    centres, middles = rng.normal(size=(8, WIDTH)), rng.normal(size=(8, 8, WIDTH))
    table = (
        0.25 * centres[codes[:, 0]]
        + 0.25 * middles[codes[:, 0], codes[:, 1]]
        + 0.25 * rng.normal(size=(ITEMS, WIDTH))
    )
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = SASRec(ItemShard(ITEMS), WIDTH, 1, 2, 0.0, 8).eval()
        model.items.weight.data = torch.from_numpy(
            table + 0.02 * rng.normal(size=table.shape)
        ).float()
        model.known.copy_(torch.from_numpy(rng.random(ITEMS) < 0.9))
        models.append(model)
    lengths = np.full(60, 6)
    dataset = InteractionDataset(
        rng.integers(0, ITEMS, lengths.sum()).astype(np.int32),
        np.arange(0, 361, 6),
        [str(u) for u in range(60)],
        [str(i) for i in range(ITEMS)],
    )
    trie = Trie(catalogue)
    exact = TokenRewards(models, rng.integers(0, 2, 60), dataset, catalogue, trie)
    return Large(dataset, catalogue, trie, models, exact, (np.arange(60), np.full(60, 4)))


@pytest.fixture(scope="module")
def scorer_folder(large: Large, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of both folds' scorers, written once for all tests that
    want the same.
    """

    @functools.cache
    def write(kind: str, shards: int = 1, prefix_items: int = LIMIT) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        for fold, model in enumerate(large.models):
            write_scorer(
                folder / f"fold{fold}",
                model.items.weight,
                model.known,
                large.trie,
                kind,
                shards,
                prefix_items,
            )
        return folder

    return write


def brute_force(large: Large) -> np.ndarray:
    """§5 word by word, in fp64."""
    codes, out = large.catalogue.codes(), []
    for user, position in zip(*large.targets, strict=True):
        model, sequence = large.models[large.exact.folds[user]], large.dataset.sequence(user)
        wide = copy.deepcopy(model).double()
        with torch.no_grad():
            logits = (
                wide(torch.from_numpy(sequence[:position].astype(np.int64))[None])[0, -1]
                @ wide.items.weight.t()
            )
        p = torch.softmax(logits.masked_fill(~model.known, -torch.inf), 0).numpy()
        target = codes[sequence[position]]
        for depth in range(codes.shape[1]):
            below = (codes[:, :depth] == target[:depth]).all(1)
            mass = np.bincount(codes[below, depth], p[below])
            out.append(mass[np.unique(codes[below, depth])] / max(p[below].sum(), 1e-300))
    return np.concatenate(out)


def variation(large: Large, found: np.ndarray) -> np.ndarray:
    """Total variation of each row from the full scan: [T, C]."""
    users, positions = large.targets
    expected = large.exact.fetch(users, positions)
    indptr, _ = large.trie.target_candidates(
        large.dataset.items[large.dataset.offsets[users] + positions]
    )
    return np.add.reduceat(np.abs(found - expected), indptr[:-1]).reshape(len(users), -1) / 2


@pytest.mark.parametrize("kind", ["flat", "ivf_pq", "hnsw"])
def test_all_items_exact_equals_the_scan(
    large: Large, scorer_folder: Callable[..., Path], kind: str
) -> None:
    """Where the top-K is the catalogue and no prefix is too long, nothing is estimated.

    The flat index, in fp32, gives the sums of fp64 over the models' vectors. The others
    keep them in fp16, and a graph search may leave some items to the tail.
    """
    folder = scorer_folder(kind)
    options = RewardOptions(top_k=ITEMS, width=100, prefix_items=ITEMS)
    expected, tolerance = brute_force(large), 1e-6 if kind == "flat" else 2e-3
    np.testing.assert_allclose(large.exact.fetch(*large.targets), expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(
        large.rewards(folder, options).fetch(*large.targets), expected, atol=tolerance, rtol=0
    )


@pytest.mark.parametrize("kind", ["flat", "ivf_pq", "hnsw"])
def test_the_tail_makes_up_for_what_the_top_items_miss(
    large: Large, scorer_folder: Callable[..., Path], kind: str
) -> None:
    rewards = large.rewards(scorer_folder(kind), RewardOptions(top_k=100, prefix_items=LIMIT))
    found = variation(large, rewards.fetch(*large.targets))
    assert found[:, 0].mean() < 0.03 and found[:, 0].max() < 0.1
    long = (
        np.diff(large.trie.node_start[1])[
            large.trie.item_node(
                1, large.dataset.items[large.dataset.offsets[large.targets[0]] + 4]
            )
        ]
        > LIMIT
    )
    assert 0 < found[long, 1].mean() < 0.05
    # Fp16.
    assert (
        long.any()
        and (~long).sum() >= 0
        and found[~long, 1:].max(initial=0) < (1e-5 if kind == "flat" else 1e-3)
    )


def test_long_prefixes_at_the_last_depth(large: Large, scorer_folder: Callable[..., Path]) -> None:
    """Every prefix counts as long, so all depths are estimated.

    At the last one a cell is a tuple of one to three items.
    """
    rewards = large.rewards(
        scorer_folder("flat", prefix_items=1), RewardOptions(top_k=100, prefix_items=1)
    )
    found = variation(large, rewards.fetch(*large.targets))
    assert found[:, 2].mean() < 0.05 and found[:, 1].mean() < 0.05


def test_shards_together_equal_one(large: Large, scorer_folder: Callable[..., Path]) -> None:
    folder = scorer_folder("flat", shards=3)
    options = RewardOptions(top_k=50, prefix_items=LIMIT)
    parts = [
        large.rewards(folder, options, shard).shard_rewards(*large.targets) for shard in range(3)
    ]
    assert sum(len(part.targets) for part in parts) == len(large.targets[0])
    together = merge_shards(parts)
    np.testing.assert_allclose(
        together, large.rewards(folder, options).fetch(*large.targets), atol=1e-6
    )
    assert variation(large, together)[:, 0].mean() < 0.03


def test_moments_describe_scores_exactly() -> None:
    rng = np.random.default_rng(1)
    vectors, queries = (
        torch.from_numpy(rng.normal(size=(50, 6)).astype(np.float32)),
        torch.from_numpy(rng.normal(size=(4, 6)).astype(np.float32)),
    )
    known = torch.ones(50, dtype=torch.bool)
    known[3] = False
    moments = cell_moments(vectors, known, np.array([0, 10, 10, 50]), np.array([0, 1, 2]))
    count, mean, variance = moments.scores(0, 3, queries)
    scores = (queries @ vectors.t()).numpy()
    first, last = np.delete(scores[:, :10], 3, axis=1), scores[:, 10:]
    assert count.tolist() == [9, 0, 40]
    np.testing.assert_allclose(
        mean[:, [0, 2]], np.stack([first.mean(1), last.mean(1)], 1), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        variance[:, [0, 2]], np.stack([first.var(1), last.var(1)], 1), rtol=1e-4, atol=1e-5
    )
    # All are scored exactly: nothing is left to estimate.
    cell = np.tile(np.r_[[0] * 3, -1, [0] * 6, [2] * 40], (4, 1))
    logs = log_masses(count, mean, variance, cell, scores, np.full(4, 9, np.float32))
    np.testing.assert_allclose(
        logs[:, [0, 2]],
        np.log(np.stack([np.exp(first).sum(1), np.exp(last).sum(1)], 1)),
        rtol=1e-5,
        atol=1e-5,
    )
    assert np.isneginf(logs[:, 1]).all()


def test_the_index_finds_the_nearest() -> None:
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(3000, 16)).astype(np.float16)
    queries = vectors[:20].astype(np.float32) * 3
    expected = np.argsort(-(queries @ vectors.astype(np.float32).T), axis=1)[:, :10]
    for kind, recall in (("flat", 1.0), ("hnsw", 0.9), ("ivf_pq", 0.6)):
        found = search_ann_index(build_ann_index(kind, vectors), queries, 50, width=30)
        assert (
            np.mean(
                [np.isin(want, have).mean() for want, have in zip(expected, found, strict=True)]
            )
            >= recall
        )
    with pytest.raises(ValueError, match="expected flat"):
        build_ann_index("lsh", vectors)


def test_a_gpu_takes_the_flat_index_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(3).normal(size=(500, 16)).astype(np.float32)
    moved = []
    monkeypatch.setattr("faiss.get_num_gpus", lambda: 8, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr(
        "faiss.index_cpu_to_gpus_list", lambda index, gpus: moved.append(gpus) or index
    )
    for kind, count in (("flat", 1), ("hnsw", 1), ("ivf_pq", 1)):
        save_ann_index(build_ann_index(kind, vectors), tmp_path / kind)
        found = search_ann_index(load_ann_index(tmp_path / kind), vectors[:3], 5, width=30)
        assert len(moved) == count and found.shape == (3, 5)
    assert moved == [[3]]


def test_the_stage_s_scorers_give_the_rewards_of_the_scan(
    world: World, flat_cf: Path, tmp_path: Path
) -> None:
    users, positions = training_targets(world.dataset, np.arange(20))
    large = world.rewards(cf=flat_cf)
    estimated = TokenRewards.open(
        flat_cf,
        world.dataset,
        world.catalogue,
        world.trie,
        options=RewardOptions(top_k=10),
    )
    scanned = copy_models(flat_cf, tmp_path / "scan")
    write_code_order(CONFIG, scanned, world.catalogue)
    exact = world.rewards(cf=scanned).fetch(users, positions)
    np.testing.assert_allclose(large.fetch(users, positions), exact, atol=1e-6)
    np.testing.assert_allclose(estimated.fetch(users, positions), exact, atol=0.05)
    assert large.counters["rows"] == len(users) * world.trie.depth


def test_more_shards_than_there_is_to_share_are_refused(large: Large) -> None:
    with pytest.raises(
        UserError, match="reward_shards 2: a catalogue of 100 items is scanned whole"
    ):
        index_kind(CFConfig(reward_shards=2), 100)
    assert len(shard_nodes(large.trie, 4)) == 4
    with pytest.raises(UserError, match="reward_shards 9: the 8 first codes"):
        shard_nodes(large.trie, 9)


def test_auto_scans_small_catalogues() -> None:
    assert (
        index_kind(CFConfig(), 65_536) == "scan"
        and index_kind(CFConfig(), 65_537) == "ivf_pq"
        and index_kind(CFConfig(reward_index="hnsw"), 10) == "hnsw"
    )
