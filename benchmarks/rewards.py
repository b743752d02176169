"""How fast and how exact are token rewards as the catalogue grows?  python benchmarks/rewards.py [--quick] [--json FILE] [--items 10000 1000000 10000000]

Every target has a history of its own and is asked for once (nothing is cached); rates are of all code levels, through the Ray service with the
client's side included, and in-process. Total variation is that of the first-code rewards from a brute-force sum over the catalogue in fp64.
With --epoch instead: the quickstart's ILRec epochs with the service, against the same epochs with rewards that were computed before (read from disk).
All of the quickstart's epochs are run: the service computes that small data set's rewards once, beside the first of them, and that time counts.
The catalogue is drawn: item vectors are sums of code vectors, as residual quantisation would recover them, and noise; histories stay near a code.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from ilrec_dist.cf.rewards.index import SCAN_ITEMS
from ilrec_dist.cf.rewards.item_scorer import PREFIX_ITEMS, read_scorer, write_scorer
from ilrec_dist.cf.rewards.layout import RewardLayout
from ilrec_dist.cf.rewards.prefix_mass import RewardOptions
from ilrec_dist.cf.rewards.token_rewards import TokenRewards
from ilrec_dist.cf.sasrec.model import SASRec, encode
from ilrec_dist.cf.sasrec.sharded_table import ItemShard
from ilrec_dist.config.load import load_config
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue, make_catalogue
from ilrec_dist.items.trie import Trie

ROOT = Path(__file__).resolve().parents[1]
WIDTH, LEVELS, CODES, BATCH, CHECKED = 64, 4, 256, 512, 64
NORM = 2.0  # of an item's vector; queries have norm 8, so this decides how peaked P_CF is: about half its mass is outside the top 512 of 10⁶ items


def first_code_shares() -> np.ndarray:
    """float64 [CODES]: how the items are spread over the first codes."""
    popularity = 1 / np.arange(1, CODES + 1) ** 0.5
    return popularity / popularity.sum()


def draw(
    folder: Path,
    items: int,
    users: int,
    seed: int = 0,
    scan_items: int = SCAN_ITEMS,
    prefix_items: int = PREFIX_ITEMS,
) -> None:
    """Write a catalogue, a CF model's vectors (with their store when it has over `scan_items` items) and one history a user."""
    rng = np.random.default_rng(seed)
    codes = np.stack(
        [rng.choice(CODES, items, p=first_code_shares())]
        + [rng.integers(0, CODES, items) for _ in range(LEVELS - 1)],
        axis=1,
    )
    catalogue = make_catalogue(codes, [CODES] * LEVELS)
    folder.mkdir(parents=True)
    catalogue.save(folder)
    trie = Trie(catalogue)
    trie.save(folder)
    table = torch.from_numpy(rng.standard_normal((items, WIDTH), dtype=np.float32)).mul_(
        0.6 * NORM / WIDTH**0.5
    )
    for level, size in enumerate((0.6, 0.45, 0.3)):
        centroids = (
            torch.from_numpy(rng.normal(size=(CODES, WIDTH)).astype(np.float32))
            * size
            * NORM
            / WIDTH**0.5
        )
        table += centroids[torch.from_numpy(codes[:, level].astype(np.int64))]
    lengths = rng.integers(3, 20, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    anchor = np.repeat(rng.integers(0, items, users), lengths)
    near = np.clip(
        catalogue.position[anchor]
        + rng.normal(scale=items / CODES / 4, size=len(anchor)).astype(np.int64),
        0,
        items - 1,
    )
    wander = rng.random(len(anchor)) < 0.3
    np.save(
        folder / "histories.npy",
        np.where(wander, rng.integers(0, items, len(anchor)), catalogue.items[near]).astype(
            np.int32
        ),
    )
    np.save(folder / "offsets.npy", offsets)
    known = torch.from_numpy(rng.random(items) < 0.98)
    if items > scan_items:
        write_scorer(folder / "fold0", table, known, trie, "ivf_pq", prefix_items=prefix_items)
    else:
        torch.save({"table": table, "known": known}, folder / "table.pt")


class NothingKept(TokenRewards):
    """Every target's rewards are computed when they are asked for: no actor begins to compute those of all training targets beside the measurement."""

    _precomputed = None


def load(folder: Path) -> TokenRewards:
    catalogue = Catalogue.load(folder)
    trie, n = Trie.load(folder, catalogue), catalogue.num_items
    offsets = np.load(folder / "offsets.npy")
    dataset = InteractionDataset(
        np.load(folder / "histories.npy"), offsets, range(len(offsets) - 1), range(n)
    )  # type: ignore[arg-type]
    torch.manual_seed(0)
    small = folder / "table.pt"
    model = SASRec(ItemShard(n if small.exists() else 1), WIDTH, 2, 2, 0.0, 50).eval()
    scorers = None
    if small.exists():
        state = torch.load(small)
        model.items.weight.data = state["table"]
        model.known.copy_(state["known"])
    else:
        scorers = [read_scorer(folder / "fold0", trie)]
    return NothingKept(
        [model], np.zeros(len(offsets) - 1, np.int64), dataset, catalogue, trie, scorers
    )


def batches(rewards: TokenRewards) -> list[tuple[np.ndarray, np.ndarray]]:
    users = np.arange(rewards.dataset.num_users)
    positions = rewards.dataset.lengths() - 1
    return [(users[i : i + BATCH], positions[i : i + BATCH]) for i in range(0, len(users), BATCH)]


@torch.no_grad()
def brute_force(rewards: TokenRewards, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """First-code rewards float64 [T, codes] by scoring every item."""
    scorer, starts = rewards.scorers[0], rewards.dataset.offsets[users]
    embed = None if scorer.large is None else partial(scorer.embed, rewards.catalogue.position)
    queries = encode(rewards.models[0], rewards.dataset.items, starts, positions, embed)
    n, node_start = rewards.catalogue.num_items, rewards.trie.node_start[1]
    masses = []
    for query in queries:
        row = torch.empty(1, n)
        for start in range(0, n, 1 << 18):
            block = row[:, start : start + (1 << 18)]
            scorer.scores(query[None], start, start + block.shape[1], block)
        scores = row.numpy()[0].astype(np.float64)
        masses.append(np.add.reduceat(np.exp(scores - scores.max()), node_start[:-1]))
    mass = np.array(masses)
    return mass / mass.sum(1, keepdims=True)


def first_rows(rewards: TokenRewards, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
    plan = RewardLayout(
        rewards.trie, rewards.dataset.items[rewards.dataset.offsets[users] + positions]
    )
    codes = rewards.trie.num_nodes(1)
    starts = np.arange(len(users)) * codes + plan.indptr[:: LEVELS - 1][:-1]
    return rewards.fetch(users, positions)[starts[:, None] + np.arange(codes)]


def measure_one(items: int, targets: int, threads: int) -> dict[str, float]:
    """One catalogue, in this process and, after that, through one actor."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "catalogue"
        started = time.perf_counter()
        # in a process of its own, so that the peak memory below is of serving alone
        subprocess.run(
            [sys.executable, __file__, "--draw", str(folder), str(items), str(targets + BATCH)],
            check=True,
        )
        result: dict[str, float] = {
            "items": items,
            "targets": targets,
            "draw_seconds": time.perf_counter() - started,
        }
        rewards = load(folder)
        warm, *rest = batches(rewards)
        rewards.fetch(*warm)
        started = time.perf_counter()
        for batch in rest:
            rewards.fetch(*batch)
        result["in_process_per_second"] = targets / (time.perf_counter() - started)
        result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        users, positions = (part[:CHECKED] for part in rest[0])
        truth = brute_force(rewards, users, positions)
        result["total_variation"] = float(
            np.abs(first_rows(rewards, users, positions) - truth).sum(1).mean() / 2
        )
        if items > SCAN_ITEMS:
            plain = TokenRewards(
                rewards.models,
                rewards.folds,
                rewards.dataset,
                rewards.catalogue,
                rewards.trie,
                rewards.scorers,
                RewardOptions(top_k=2048),
            )
            result["total_variation_top_2048"] = float(
                np.abs(first_rows(plain, users, positions) - truth).sum(1).mean() / 2
            )
        result.update(through_the_service(folder, warm, rest, threads))
    return result


def through_the_service(
    folder: Path,
    warm: tuple[np.ndarray, np.ndarray],
    rest: list[tuple[np.ndarray, np.ndarray]],
    actors: int,
) -> dict[str, float]:
    """As many replicas of one thread as there are cores to use, all asked from here."""
    import ray

    from ilrec_dist.cf.rewards.futures import LatencyMeter
    from ilrec_dist.cf.rewards.service import RewardActor, RewardClient

    path = f"{ROOT}:{ROOT / 'benchmarks'}"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    try:
        from rewards import (
            load as importable_load,  # by its module's name, so that the actor can import it
        )

        kind: Any = ray.remote(RewardActor)
        loader = partial(importable_load, folder)
        replicas = [
            kind.options(name=f"bench-{number}-0", num_cpus=0).remote(loader, 1)
            for number in range(actors)
        ]
        client = RewardClient("bench", replicas=actors)
        for answer in [client.fetch_async(*warm) for _ in replicas]:
            answer.result()
        client.meter = LatencyMeter()  # the first answers waited for the actors to load
        started = time.perf_counter()
        pending = []
        for batch in rest:
            pending.append(client.fetch_async(*batch))
            if len(pending) > 2 * actors:
                pending.pop(0).result()
        for answer in pending:
            answer.result()
        seconds = time.perf_counter() - started
        peaks = ray.get(
            [
                actor.__ray_call__.remote(
                    lambda _: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                )
                for actor in replicas
            ]
        )
    finally:
        ray.shutdown()
    summary = client.meter.summary()
    return {
        "service_per_second": sum(len(users) for users, _ in rest) / seconds,
        "latency_p50": summary["latency_p50"],
        "latency_p99": summary["latency_p99"],
        "actors": actors,
        "actor_peak_mib": max(peaks),
    }


WARM_STEPS = 10


def measure_epoch() -> dict[str, Any]:
    """Seconds an epoch of the quickstart's ILRec training takes: the mean over all its epochs, without the first WARM_STEPS steps but for what these
    waited for rewards. The service computes the small data set's rewards once, in the first epoch, on the cores that train.
    """
    with tempfile.TemporaryDirectory() as temporary:
        train_once(temporary, 1, "cf.reward_cache=true")  # fills the disk
        epochs, spent = load_config(ROOT / "configs" / "quickstart.yaml", []).train.epochs, {}
        for name, cached in (("service", "false"), ("precomputed", "true")):
            spent[name], answered_from_disk = train_once(
                temporary, epochs, f"cf.reward_cache={cached}"
            )
            if answered_from_disk != (name == "precomputed"):
                raise RuntimeError(f"{name}: rewards did not come from where they should")
    return {
        "epoch_seconds": spent,
        "epochs": epochs,
        "ratio": spent["service"] / spent["precomputed"],
    }


def train_once(runs_dir: str, epochs: int, *settings: str) -> tuple[float, bool]:
    """(seconds an epoch of one training, whether all rewards came from disk). The stages before it are made by the first call."""
    run = Path(runs_dir) / "quickstart"
    shutil.rmtree(run / "train", ignore_errors=True)
    given = [
        f"runs_dir={runs_dir}",
        "train.methods=[ilrec]",
        f"train.epochs={epochs}",
        f"train.validate_epochs={epochs}",
        "cf.rewards=actor",
    ]
    given += [
        "cf.epochs=1",
        *settings,
    ]  # the actor's work does not depend on how well the CF model was trained
    for stage in ("train",) if (run / "cf").exists() else ("prepare", "index", "cf", "train"):
        command = [
            sys.executable,
            "-m",
            "ilrec_dist.cli.main",
            stage,
            str(ROOT / "configs" / "quickstart.yaml"),
            *given,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [
        json.loads(line)
        for line in (run / "train" / "ilrec-seed0" / "metrics.jsonl").read_text().splitlines()
    ]
    lines = [line for line in lines if "time/all" in line]
    last, warm = lines[-1], [line for line in lines if line["step"] > WARM_STEPS]
    steady = sum(line["time/all"] for line in warm) * last["step"] / (last["step"] - WARM_STEPS)
    first_wait = next(line for line in lines if line["step"] >= WARM_STEPS)["rewards/wait_seconds"]
    return (steady + first_wait) / epochs, last["rewards/answers"] == last["rewards/cached"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="10⁴ and 10⁵ items, under 50 seconds on two free cores"
    )
    parser.add_argument(
        "--items",
        type=int,
        nargs="+",
        default=None,
        help="catalogue sizes (default 10⁴, 10⁶ and 10⁷)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="of the in-process rewards, and actors of the service",
    )
    parser.add_argument(
        "--epoch",
        action="store_true",
        help="instead: a quickstart epoch with the service against one with precomputed rewards",
    )
    parser.add_argument("--json", type=Path, help="write the table's rows here")
    parser.add_argument("--draw", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.draw:
        draw(Path(arguments.draw[0]), int(arguments.draw[1]), int(arguments.draw[2]))
        return
    sizes = arguments.items or (
        [10_000, 100_000] if arguments.quick else [10_000, 1_000_000, 10_000_000]
    )
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if arguments.epoch:
        found = measure_epoch()
        print(machine)
        print(
            ", ".join(
                f"{name} {seconds:.1f} s an epoch"
                for name, seconds in found["epoch_seconds"].items()
            )
            + f": ratio {found['ratio']:.3f}"
        )
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": machine, **found}, indent=2) + "\n")
        return
    print(
        f"{machine}\n{'items':>10} {'in-process/s':>13} {'service/s':>10} {'p99 s':>7} {'first-code TV':>14} {'peak MiB':>9} {'actor MiB':>10}"
    )
    rows = []
    for items in sizes:
        rows.append(
            measure_one(
                items,
                BATCH * (4 if arguments.quick else 16 if items <= SCAN_ITEMS else 8),
                arguments.threads,
            )
        )
        row = rows[-1]
        print(
            f"{items:>10,} {row['in_process_per_second']:>13,.0f} {row['service_per_second']:>10,.0f} {row['latency_p99']:>7.2f} "
            f"{row['total_variation']:>14.4g} {row['peak_mib']:>9,.0f} {row['actor_peak_mib']:>10,.0f}",
            flush=True,
        )
    growth = rows[0]["service_per_second"] / rows[-1]["service_per_second"]
    print(f"cost per target grows {growth:.2f} × from {sizes[0]:,} to {sizes[-1]:,} items")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine, "rows": rows, "growth": growth}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
