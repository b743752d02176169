"""Does the plan of docs/scaling.md hold?  python benchmarks/scaling.py [--quick] [--json FILE]

Fits the plan's constants on 10⁴, 10⁵ and 10⁶ items, predicts 10⁷, measures 10⁷ and prints the error of each prediction (at most 25 %): the memory of a
process that serves rewards (anonymous, without mapped files), the bytes on disk, and the CPU time of a target's rewards. Catalogues and histories are those
of benchmarks/rewards.py; every size runs in a process of its own, with one thread. The smaller sizes are measured with two limits of what is scanned, since
10⁷ estimates what they scan.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from rewards import BATCH, CODES, WIDTH, batches, draw, first_code_shares, load
from scipy.optimize import nnls

from ilrec_dist.cf.rewards.ann import num_lists, num_probes
from ilrec_dist.cf.rewards.cell_moments import RANK
from ilrec_dist.cf.rewards.item_scorer import PREFIX_ITEMS
from ilrec_dist.cf.rewards.prefix_mass import RewardOptions
from ilrec_dist.cf.rewards.token_rewards import TokenRewards

SHORT, WIDE = (
    1024,
    32,
)  # a lower limit of what is scanned, and a wider search: 10⁷ items are estimated and searched as these smaller ones are
LIMIT = 0.25
MOMENT_BYTES = 4 * WIDTH * (RANK + 2)  # mean, factor and diagonal of a cell
REPEATS = 3


def work(items: int, prefix_items: int, width: int) -> list[float]:
    """What a target's rewards cost, in counts: once; items scanned below its prefix; 1 where a long prefix is estimated; codes the index looks through;
    and the orders of magnitude of the catalogue over the smallest, as each reach into a larger memory takes longer."""
    below = items * first_code_shares()
    long = below > prefix_items
    scanned = np.where(long, below / CODES, below)
    lists, wanted = num_lists(items), RewardOptions().top_k * 5 // 4
    codes = lists + num_probes(lists, items, wanted, width) * items / lists
    return [
        1.0,
        float(first_code_shares() @ scanned),
        float(first_code_shares()[long].sum()),
        codes,
        float(np.log10(items / 10_000)),
    ]


def moment_cells(items: int, prefix_items: int) -> int:
    """Cells whose moments are kept: all first codes, and the children of those with over `prefix_items` items."""
    return CODES + CODES * int((items * first_code_shares() > prefix_items).sum())


def measure(items: int) -> dict[str, Any]:
    """Memory, disk, and microseconds a target under several settings: (limit of what is scanned, width of the search, microseconds)."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    stored = SHORT if items <= 1_000_000 else PREFIX_ITEMS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "catalogue"
        command = [sys.executable, __file__, "--draw", str(folder), str(items), str(stored)]
        subprocess.run(
            command, check=True
        )  # in a process of its own, so that its memory is not counted
        rewards = load(folder)
        warm, *rest = batches(rewards)
        times, width = [], RewardOptions().width
        settings = (
            [(PREFIX_ITEMS, width)]
            if stored == PREFIX_ITEMS
            else [(PREFIX_ITEMS, width), (SHORT, width), (SHORT, WIDE)]
        )
        for limit, wide in settings:
            options = RewardOptions(prefix_items=limit, width=wide)
            served = TokenRewards(
                rewards.models,
                rewards.folds,
                rewards.dataset,
                rewards.catalogue,
                rewards.trie,
                rewards.scorers,
                options,
            )
            served.fetch(*warm)
            times.append((limit, wide, min(_microseconds(served, rest) for _ in range(REPEATS))))
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what was freed goes back, so that what is held is counted
        memory = next(
            int(line.split()[1]) / 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("RssAnon")
        )
    cells = moment_cells(items, stored)
    return {
        "items": items,
        "stored": stored,
        "cells": cells,
        "memory_mib": memory,
        "disk_mib": disk / 2**20,
        "microseconds": times,
    }


def _microseconds(rewards: TokenRewards, rest: list[tuple[np.ndarray, np.ndarray]]) -> float:
    started = time.process_time()
    for batch in rest:
        rewards.fetch(*batch)
    return 1e6 * (time.process_time() - started) / sum(len(users) for users, _ in rest)


def line(rows: list[dict[str, Any]], name: str, bytes_per_cell: float) -> tuple[float, float]:
    """(MiB that do not grow, MiB an item), least squares of the relative error, after the moments' bytes are taken out."""
    y = np.array([row[name] - row["cells"] * bytes_per_cell / 2**20 for row in rows])
    features = np.array([[1.0, row["items"]] for row in rows]) / y[:, None]
    fixed, per_item = nnls(features, np.ones(len(rows)))[0]
    return float(fixed), float(per_item)


def predict(
    rows: list[dict[str, Any]], items: int, prefix_items: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(the predictions for `items`, the constants they come from)."""
    cells = moment_cells(items, prefix_items)
    constants: dict[str, float] = {}
    found: dict[str, float] = {}
    for name, bytes_per_cell in (
        ("memory_mib", MOMENT_BYTES),
        ("disk_mib", MOMENT_BYTES - 2 * WIDTH * RANK),
    ):  # the factor is fp16 on disk
        fixed, per_item = line(rows, name, bytes_per_cell)
        found[name] = fixed + per_item * items + cells * bytes_per_cell / 2**20
        constants |= {
            f"{name}_fixed": fixed,
            f"{name.removesuffix('_mib')}_bytes_per_item": per_item * 2**20,
        }
    points = [
        (work(row["items"], limit, width), spent)
        for row in rows
        for limit, width, spent in row["microseconds"]
    ]
    costs = nnls(
        np.array([np.array(counts) / spent for counts, spent in points]), np.ones(len(points))
    )[0]
    found["microseconds"] = float(costs @ work(items, prefix_items, RewardOptions().width))
    constants |= dict(
        zip(
            (
                "us_per_target",
                "us_per_scanned_item",
                "us_per_estimate",
                "us_per_index_code",
                "us_per_order_of_magnitude",
            ),
            map(float, costs),
            strict=True,
        )
    )
    return found, constants


def in_its_own_process(items: int) -> dict[str, Any]:
    print(f"measuring {items:,} items …", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--one", str(items)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fit on 10⁴ … 10⁵, predict 3·10⁵: that the script runs, not how well it predicts",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--draw", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.draw:
        folder, items, stored = arguments.draw
        draw(Path(folder), int(items), 5 * BATCH, scan_items=0, prefix_items=int(stored))
        return
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
        "torch": torch.__version__,
        "faiss": faiss.__version__,
    }
    fitted, wanted = (
        ([10_000, 30_000, 100_000], 300_000)
        if arguments.quick
        else ([10_000, 100_000, 1_000_000], 10_000_000)
    )
    rows = [in_its_own_process(items) for items in fitted]
    measured = in_its_own_process(wanted)
    predicted, constants = predict(rows, wanted, measured["stored"])
    print(machine)
    for row in [*rows, measured]:
        spent = ", ".join(
            f"{value:.0f} µs (scans up to {limit:,}, width {width})"
            for limit, width, value in row["microseconds"]
        )
        print(
            f"{row['items']:>12,} items: {row['memory_mib']:,.0f} MiB, on disk {row['disk_mib']:,.0f} MiB; a target {spent}"
        )
    print("constants: " + ", ".join(f"{name} {value:.4g}" for name, value in constants.items()))
    errors = {}
    for name, value in predicted.items():
        truth = measured[name] if name != "microseconds" else measured[name][0][2]
        errors[name] = value / truth - 1
        print(
            f"{name:<14} predicted {value:>10,.1f}  measured {truth:>10,.1f}  error {errors[name]:+.1%} (limit ±{LIMIT:.0%})"
        )
    if arguments.json:
        result = {
            "machine": machine,
            "rows": rows,
            "measured": measured,
            "predicted": predicted,
            "constants": constants,
            "errors": errors,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
