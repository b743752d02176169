"""The plan's memory of a host against the arrays that reward processes really hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards import index, item_scorer, precomputed
from ilrec_dist.cf.rewards.item_scorer import ItemScorer, in_memory_scorer, read_scorer
from ilrec_dist.cf.rewards.precomputed import PrecomputedRewards
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.data.reversed import both_directions
from ilrec_dist.items.catalogue import Catalogue, make_catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.plan import host
from ilrec_dist.plan.host import host_bytes, kept_rewards, reward_process_bytes
from ilrec_dist.plan.memory import INDEX_SCRATCH, flat_index_bytes
from ilrec_dist.plan.workload import DataSizes, ItemTokens

WIDTH, FOLDS = 16, 2
CF = CFConfig(hidden_size=WIDTH, cf_folds=FOLDS, rewards="actor")


def evenly_used(items: int, sizes: tuple[int, ...]) -> Catalogue:
    numbers, codes = np.arange(items), []
    for size in sizes:
        codes.append(numbers % size)
        numbers = numbers // size
    return make_catalogue(np.stack(codes, 1), sizes)


def known_but_one(items: int) -> torch.Tensor:
    known = torch.ones(items, dtype=torch.bool)
    known[0] = False
    return known


def held(scorer: ItemScorer) -> dict[str, float]:
    """Bytes of one fold in a process's own memory."""
    assert scorer.bias is not None
    if scorer.large is None:
        return {"item vectors": scorer.vectors.nbytes, "known items": scorer.bias.nbytes}
    large = scorer.large
    tables = [t for m in large.moments for t in (m.mean, m.factor, m.diagonal, m.nodes, m.count)]
    return {
        "index": sum(len(faiss.serialize_index(one)) for one in large.indexes),
        "known items": scorer.bias.nbytes + sum(known.nbytes for known in large.known),
        "cell moments": sum(table.nbytes for table in tables),
    }


@pytest.mark.parametrize(
    ("kind", "items", "sizes", "shards"),
    [
        ("scan", 3_000, (10, 30, 10), 1),
        ("flat", 20_000, (1, 16, 2_048), 1),
        ("hnsw", 17_000, (1, 16, 2_048), 1),
        ("ivf_pq", 100_000, (4, 16, 2_048), 4),
    ],
)
def test_a_reward_process_holds_what_the_plan_says(tmp_path: Path, kind, items, sizes, shards):
    catalogue = evenly_used(items, sizes)
    table, known = torch.randn(items, WIDTH), known_but_one(items)
    if kind == "scan":
        scorer = in_memory_scorer(table, known, catalogue)
    else:
        trie = Trie(catalogue)
        item_scorer.write_scorer(tmp_path / "fold0", table, known, trie, kind, shards)
        scorer = read_scorer(tmp_path / "fold0", trie, None if shards == 1 else shards - 1)
    cf = dataclasses.replace(CF, reward_index=kind)
    planned = reward_process_bytes(items, ItemTokens(sizes, sum(sizes), ""), cf, shards)
    found = held(scorer)
    assert set(planned) == set(found)
    for name, size in planned.items():
        # The lists of an index have centroids and padding, which count where items are few.
        error = 0.15 if name == "index" else 0.001
        assert size == pytest.approx(FOLDS * found[name], rel=error), name


def test_a_worker_s_flat_indexes_are_on_its_gpu_and_an_actor_s_are_not(tmp_path: Path):
    items, sizes, shards = 20_000, (16, 16, 2_048), 2
    trie = Trie(evenly_used(items, sizes))
    table, known = torch.randn(items, WIDTH), torch.ones(items, dtype=torch.bool)
    item_scorer.write_scorer(tmp_path / "fold0", table, known, trie, "flat", shards)
    large = read_scorer(tmp_path / "fold0", trie).large
    assert large is not None and all(isinstance(one, faiss.IndexFlatIP) for one in large.indexes)
    here = dataclasses.replace(
        CF, rewards="in_process", reward_index="flat", reward_shards=shards, hidden_size=WIDTH
    )
    assert flat_index_bytes(here, items) == {
        "rewards: flat index": FOLDS * sum(4 * one.ntotal * one.d for one in large.indexes),
        "rewards: FAISS's scratch": INDEX_SCRATCH * FOLDS * len(large.indexes),
    }
    # It goes through the host's memory a shard of a fold at a time.
    data, tokens = DataSizes(items, 100, 1_000), ItemTokens(sizes, sum(sizes), "")

    def hosted(cf: CFConfig) -> dict[str, float]:
        parts = host_bytes(data, tokens, cf, 0, 0, 1, 2, 2, True, True, False)
        assert parts is not None
        return {name: size for name, size in parts.items() if "index" in name}

    largest = max(4 * one.ntotal * one.d for one in large.indexes)
    worker = "rewards in workers (1 on a node): a flat index that is loaded"
    assert hosted(here) == {worker: largest}
    actor = dataclasses.replace(here, rewards="actor")
    assert flat_index_bytes(actor, items) == {}
    assert hosted(actor) == {
        "reward actors (2 on a node): index": FOLDS * items * 4 * WIDTH,
    }
    for other in ("auto", "ivf_pq", "hnsw"):
        assert not flat_index_bytes(dataclasses.replace(here, reward_index=other), items)


@pytest.mark.parametrize("both", [False, True])
def test_kept_rewards_are_those_of_all_training_targets(both):
    sizes, users, length = (6, 10), 50, 7
    catalogue = evenly_used(60, sizes)
    rng = np.random.default_rng(0)
    dataset = InteractionDataset(
        rng.integers(0, 60, users * length).astype(np.int32),
        np.arange(0, users * length + 1, length),
        [str(user) for user in range(users)],
        [str(item) for item in range(60)],
    )
    forward, dataset = dataset, both_directions(dataset) if both else dataset
    kept = PrecomputedRewards(dataset, Trie(catalogue), lambda *_: pytest.fail("nothing is asked"))
    arrays = (kept.rewards, kept.counts, kept.ends, kept.covered)
    tokens = ItemTokens(sizes, sum(sizes), "")
    planned = kept_rewards(60, users, users * length, tokens, both)
    assert planned == sum(array.nbytes for array in arrays)
    assert kept_rewards(60, users, host.KEPT_REWARDS, tokens, both) == 0
    # Twice as many sequences, which the loader keeps beside those that are mapped.
    data = DataSizes(60, users, users * length)
    own = {
        name: size
        for name, size in of_a_node(data, tokens, both_directions=both).items()
        if "directions" in name or "windows" in name or "users" in name
    }
    arrays = [dataset.offsets[1:], dataset.split_positions] if both else []
    orders = 2 * 12 * dataset.num_users
    assert sum(own.values()) == 3 * sum(map(size_of, arrays)) + orders + 8 * dataset.num_users
    assert dataset.num_users == len(forward.user_ids) * (2 if both else 1)


def size_of(array: np.ndarray) -> int:
    return array.nbytes


def of_a_node(data: DataSizes, tokens: ItemTokens, both_directions: bool) -> dict[str, float]:
    """Of two workers and a reward actor."""
    parts = host_bytes(data, tokens, CF, 0, 0, 1, 2, 1, True, True, both_directions)
    assert parts is not None
    return parts


def rewards_of_a_node(cf: CFConfig, nodes: int) -> float:
    data = DataSizes(10**8, 10**6, 10**7)
    tokens = ItemTokens((256,) * 4, 1_024, "")
    parts = host_bytes(data, tokens, cf, 0, 0, nodes, 8, 2, True, True, False)
    assert parts is not None
    return sum(size for name, size in parts.items() if name.startswith("reward"))


def test_every_shard_of_every_replica_that_runs_on_a_node_is_counted():
    cf = dataclasses.replace(CF, cf_folds=4, hidden_size=64)
    rows, users = 4 * 10**8, 8 * 10**6
    # 256 first codes, and the children of all of these and of the second codes.
    moments = 4 * (256 + 256**2) * (4 * 64 * 10 + 12)

    def sharded(shards: int, replicas: int = 1) -> CFConfig:
        return dataclasses.replace(cf, reward_shards=shards, reward_replicas=replicas)

    assert rewards_of_a_node(sharded(1), 1) == rows * 32 + moments + users
    # Together four shards hold one index, and each the biases, moments and users.
    assert rewards_of_a_node(sharded(4), 1) == rows * (28 + 4 * 4) + 4 * (moments + users)
    assert rewards_of_a_node(sharded(4, 2), 1) == 2 * rewards_of_a_node(sharded(4), 1)
    # Eight actors on three nodes: three on one.
    assert rewards_of_a_node(sharded(4, 2), 3) == 3 / 4 * rewards_of_a_node(sharded(4), 1)
    # One worker of each of four groups, with all shards.
    workers = dataclasses.replace(sharded(4), rewards="in_process")
    assert rewards_of_a_node(workers, 1) == 4 * rewards_of_a_node(sharded(1), 1)


def test_the_limits_are_those_of_the_rewards():
    assert host.SCANNED_ITEMS == index.SCAN_ITEMS
    assert host.PREFIX_ITEMS == item_scorer.PREFIX_ITEMS
    assert host.KEPT_REWARDS == precomputed.LIMIT_BYTES
