"""How fast and how exact are token rewards as the catalogue grows?

python benchmarks/rewards.py [--quick] [--json FILE] [--items 10000
1000000 10000000] python benchmarks/rewards.py --epoch [--json FILE]

Every target has a history of its own and is asked for once, and nothing is stored.
Rates are of all code levels, through the Ray service with the client's side included,
and in this process. Total variation is that of the first-code rewards from a
brute-force sum over the catalogue in fp64. `reward_catalogue.py` draws the catalogues.

With --epoch the quickstart's ILRec epochs with the service are compared with the same
epochs with rewards that were computed before and are read from disk. All of the
quickstart's epochs are run: the service computes that small data set's rewards once,
beside the first of them, and that time counts.
"""

from __future__ import annotations

import json
import os
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
from harness import (
    ROOT,
    command_line,
    describe_machine,
    machine_line,
    peak_mib,
    write_figures,
)
from reward_catalogue import BATCH, LEVELS, Targets, batches, draw_in_own_process, load

from ilrec_dist.cf.rewards.futures import LatencyMeter
from ilrec_dist.cf.rewards.index import SCAN_ITEMS
from ilrec_dist.cf.rewards.layout import RewardLayout
from ilrec_dist.cf.rewards.prefix_mass import RewardOptions
from ilrec_dist.cf.rewards.token_rewards import TokenRewards
from ilrec_dist.cf.sasrec.model import encode

CHECKED_TARGETS = 64
# How many items the brute force scores at a time.
BLOCK_ITEMS = 1 << 18
WARM_STEPS = 10
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@torch.no_grad()
def brute_force(rewards: TokenRewards, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """First-code rewards float64 [T, codes] by scoring every item."""
    scorer, starts = rewards.scorers[0], rewards.dataset.offsets[users]
    embed = None if scorer.large is None else partial(scorer.embed, rewards.catalogue.position)
    queries = encode(rewards.models[0], rewards.dataset.items, starts, positions, embed)
    items, node_start = rewards.catalogue.num_items, rewards.trie.node_start[1]
    masses = []
    for query in queries:
        row = torch.empty(1, items)
        for start in range(0, items, BLOCK_ITEMS):
            block = row[:, start : start + BLOCK_ITEMS]
            scorer.scores(query[None], start, start + block.shape[1], block)
        scores = row.numpy()[0].astype(np.float64)
        masses.append(np.add.reduceat(np.exp(scores - scores.max()), node_start[:-1]))
    mass = np.array(masses)
    return np.asarray(mass / mass.sum(1, keepdims=True))


def first_code_rewards(
    rewards: TokenRewards, users: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """First-code rewards float32 [T, codes] as they are served."""
    layout = RewardLayout(
        rewards.trie, rewards.dataset.items[rewards.dataset.offsets[users] + positions]
    )
    codes = rewards.trie.num_nodes(1)
    starts = np.arange(len(users)) * codes + layout.indptr[:: LEVELS - 1][:-1]
    return np.asarray(rewards.fetch(users, positions)[starts[:, None] + np.arange(codes)])


def measure(items: int, targets: int, threads: int) -> dict[str, float]:
    """One catalogue, in this process and, after that, through the service."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "catalogue"
        draw_seconds = draw_in_own_process(folder, items, targets + BATCH)
        rewards = load(folder)
        warm, *rest = batches(rewards)
        rewards.fetch(*warm)
        started = time.perf_counter()
        for batch in rest:
            rewards.fetch(*batch)
        seconds = time.perf_counter() - started
        return {
            "items": items,
            "targets": targets,
            "draw_seconds": draw_seconds,
            "in_process_per_second": targets / seconds,
            "peak_mib": peak_mib(),
            **total_variations(rewards, rest[0]),
            **through_the_service(folder, warm, rest, threads),
        }


def total_variations(rewards: TokenRewards, batch: Targets) -> dict[str, float]:
    """Mean distances of the first-code rewards from the brute-force sum."""
    users, positions = (part[:CHECKED_TARGETS] for part in batch)
    truth = brute_force(rewards, users, positions)

    def distance(served: TokenRewards) -> float:
        difference = np.abs(first_code_rewards(served, users, positions) - truth)
        return float(difference.sum(1).mean() / 2)

    distances = {"total_variation": distance(rewards)}
    if rewards.catalogue.num_items > SCAN_ITEMS:
        top_2048 = TokenRewards(
            rewards.models,
            rewards.folds,
            rewards.dataset,
            rewards.catalogue,
            rewards.trie,
            rewards.scorers,
            RewardOptions(top_k=2048),
        )
        distances["total_variation_top_2048"] = distance(top_2048)
    return distances


def through_the_service(
    folder: Path, warm: Targets, rest: list[Targets], actors: int
) -> dict[str, float]:
    """As many replicas of one thread as there are cores to use, all asked from here."""
    # Ray loads only now, so that the peak of serving in this process is without it.
    import ray

    from ilrec_dist.cf.rewards.service import RewardActor, RewardClient

    path = f"{ROOT}:{ROOT / 'benchmarks'}"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    try:
        kind: Any = ray.remote(RewardActor)
        replicas = [
            kind.options(name=f"bench-{number}-0", num_cpus=0).remote(partial(load, folder), 1)
            for number in range(actors)
        ]
        client = RewardClient("bench", replicas=actors)
        for answer in [client.fetch_async(*warm) for _ in replicas]:
            answer.result()
        # The first answers waited for the actors to load.
        client.meter = LatencyMeter()
        started = time.perf_counter()
        pending = []
        for batch in rest:
            pending.append(client.fetch_async(*batch))
            if len(pending) > 2 * actors:
                pending.pop(0).result()
        for answer in pending:
            answer.result()
        seconds = time.perf_counter() - started
        peaks = ray.get([actor.__ray_call__.remote(lambda _: peak_mib()) for actor in replicas])
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


def measure_epoch() -> dict[str, Any]:
    """The seconds that an epoch of the quickstart's ILRec training takes.

    It is the mean over all its epochs, without the first WARM_STEPS steps
    but for what these waited for rewards. The service computes the small
    data set's rewards once, in the first epoch, on the cores that train.
    """
    # The configuration loads Megatron, which the peak of serving in this process is without.
    from ilrec_dist.config.load import load_config

    with tempfile.TemporaryDirectory() as runs_dir:
        # The first training fills the disk.
        train(runs_dir, 1, "cf.reward_cache=true")
        epochs = load_config(QUICKSTART, []).train.epochs
        seconds = {}
        for name, cached in (("service", "false"), ("precomputed", "true")):
            seconds[name], all_from_disk = train(runs_dir, epochs, f"cf.reward_cache={cached}")
            if all_from_disk != (name == "precomputed"):
                raise RuntimeError(f"{name}: rewards did not come from where they should")
    ratio = seconds["service"] / seconds["precomputed"]
    return {"epoch_seconds": seconds, "epochs": epochs, "ratio": ratio}


def train(runs_dir: str, epochs: int, setting: str) -> tuple[float, bool]:
    """(seconds an epoch of one training, whether all rewards came from disk).

    The stages before the training are made by the first call.
    """
    run = Path(runs_dir) / "quickstart"
    shutil.rmtree(run / "train", ignore_errors=True)
    settings = [
        f"runs_dir={runs_dir}",
        "train.methods=[ilrec]",
        f"train.epochs={epochs}",
        f"train.validate_epochs={epochs}",
        "cf.rewards=actor",
        # The actor's work does not depend on how well the CF model was trained.
        "cf.epochs=1",
        setting,
    ]
    for stage in ("train",) if (run / "cf").exists() else ("prepare", "index", "cf", "train"):
        subprocess.run(
            [sys.executable, "-m", "ilrec_dist.cli", stage, str(QUICKSTART), *settings],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    log = run / "train" / "ilrec-seed0" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "time/all" in line]
    last, warm = lines[-1], [line for line in lines if line["step"] > WARM_STEPS]
    steady = sum(line["time/all"] for line in warm) * last["step"] / (last["step"] - WARM_STEPS)
    first_wait = next(line for line in lines if line["step"] >= WARM_STEPS)["rewards/wait_seconds"]
    return (steady + first_wait) / epochs, last["rewards/answers"] == last["rewards/cached"]


def print_epochs(figures: dict[str, Any]) -> None:
    parts = [f"{name} {value:.1f} s an epoch" for name, value in figures["epoch_seconds"].items()]
    print(f"{', '.join(parts)}: ratio {figures['ratio']:.3f}")


def measure_sizes(sizes: list[int], threads: int, quick: bool) -> dict[str, Any]:
    """A row of the table for each size, printed when it is measured."""
    print(
        f"{'items':>10} {'in-process/s':>13} {'service/s':>10} {'p99 s':>7} {'first-code TV':>14} "
        f"{'peak MiB':>9} {'actor MiB':>10}",
        flush=True,
    )
    rows = []
    for items in sizes:
        targets = BATCH * (4 if quick else 16 if items <= SCAN_ITEMS else 8)
        rows.append(row := measure(items, targets, threads))
        print(
            f"{items:>10,} {row['in_process_per_second']:>13,.0f} "
            f"{row['service_per_second']:>10,.0f} {row['latency_p99']:>7.2f} "
            f"{row['total_variation']:>14.4g} {row['peak_mib']:>9,.0f} "
            f"{row['actor_peak_mib']:>10,.0f}",
            flush=True,
        )
    growth = rows[0]["service_per_second"] / rows[-1]["service_per_second"]
    print(f"cost per target grows {growth:.2f} × from {sizes[0]:,} to {sizes[-1]:,} items")
    return {"rows": rows, "growth": growth}


def main() -> None:
    parser = command_line(__doc__, "10⁴ and 10⁵ items, under 50 seconds on two free cores")
    parser.add_argument(
        "--items", type=int, nargs="+", help="catalogue sizes (default 10⁴, 10⁶ and 10⁷)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="of the in-process rewards, and actors of the service",
    )
    parser.add_argument(
        "--epoch",
        action="store_true",
        help="instead: a quickstart epoch with the service against one with precomputed rewards",
    )
    arguments = parser.parse_args()
    machine = describe_machine(threads=arguments.threads)
    print(machine_line(machine), flush=True)
    if arguments.epoch:
        figures = measure_epoch()
        print_epochs(figures)
    else:
        torch.set_num_threads(arguments.threads)
        faiss.omp_set_num_threads(arguments.threads)
        sizes = [10_000, 100_000] if arguments.quick else [10_000, 1_000_000, 10_000_000]
        figures = measure_sizes(arguments.items or sizes, arguments.threads, arguments.quick)
    write_figures(arguments.json, {"machine": machine, **figures})


if __name__ == "__main__":
    main()
