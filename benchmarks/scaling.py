"""Does the plan of docs/scaling.md hold?

    python benchmarks/scaling.py [--quick] [--json FILE]

Fits the plan's constants on 10⁴, 10⁵ and 10⁶ items, predicts 10⁷, measures 10⁷ and
prints the error of each prediction (at most 25 %): the memory of a process that serves
rewards (anonymous, without mapped files), the bytes on disk, and the CPU time of a
target's rewards. Catalogues and histories are those of `rewards.py`; every size runs in
a process of its own, with one thread. The smaller sizes are measured with two limits of
what is scanned, since 10⁷ estimates what they scan.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from harness import (
    anonymous_mib,
    command_line,
    describe_machine,
    in_own_process,
    machine_line,
    write_figures,
)
from reward_catalogue import (
    BATCH,
    CODES,
    WIDTH,
    Targets,
    batches,
    draw_in_own_process,
    first_code_shares,
    load,
)
from scipy.optimize import nnls

from ilrec_dist.cf.rewards.ann import num_lists, num_probes
from ilrec_dist.cf.rewards.cell_moments import RANK
from ilrec_dist.cf.rewards.item_scorer import PREFIX_ITEMS
from ilrec_dist.cf.rewards.prefix_mass import RewardOptions
from ilrec_dist.cf.rewards.token_rewards import TokenRewards

# A lower limit of what is scanned, and a wider search: 10⁷ items are estimated and searched as
# these smaller sizes are with them.
SHORT, WIDE = 1024, 32
ERROR_LIMIT = 0.25
# Mean, factor and diagonal of a cell, in memory; the factor is fp16 on disk.
MOMENT_BYTES = 4 * WIDTH * (RANK + 2)
MOMENT_BYTES_ON_DISK = MOMENT_BYTES - 2 * WIDTH * RANK
REPEATS = 3
COSTS = (
    "us_per_target",
    "us_per_scanned_item",
    "us_per_estimate",
    "us_per_index_code",
    "us_per_order_of_magnitude",
)


def work(items: int, prefix_items: int, width: int) -> list[float]:
    """What a target's rewards cost, as a count for each of COSTS.

    The target itself; items scanned below its prefix; 1 where a long prefix is
    estimated; codes that the index looks through; and the orders of magnitude of the
    catalogue over the smallest, as each reach into a larger memory takes longer.
    """
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
    """Cells whose moments are stored.

    They are all first codes, and the children of
    those with more than `prefix_items` items.
    """
    split = int((items * first_code_shares() > prefix_items).sum())
    return int(CODES * (1 + split))


def measure(items: int) -> dict[str, Any]:
    """Memory, disk, and microseconds a target under several settings.

    A setting is (limit of what is scanned, width of the search, microseconds).
    """
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    stored = SHORT if items <= 1_000_000 else PREFIX_ITEMS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "catalogue"
        draw_in_own_process(folder, items, 5 * BATCH, scan_items=0, prefix_items=stored)
        rewards = load(folder)
        warm, *rest = batches(rewards)
        times, width = [], RewardOptions().width
        settings = [(PREFIX_ITEMS, width)]
        if stored != PREFIX_ITEMS:
            settings += [(SHORT, width), (SHORT, WIDE)]
        for limit, wide in settings:
            served = TokenRewards(
                rewards.models,
                rewards.folds,
                rewards.dataset,
                rewards.catalogue,
                rewards.trie,
                rewards.scorers,
                RewardOptions(prefix_items=limit, width=wide),
            )
            served.fetch(*warm)
            best = min(target_microseconds(served, rest) for _ in range(REPEATS))
            times.append((limit, wide, best))
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        # What was freed goes back to the system, so that what is held is counted.
        ctypes.CDLL(None).malloc_trim(0)
        memory = anonymous_mib()
    return {
        "items": items,
        "stored": stored,
        "cells": moment_cells(items, stored),
        "memory_mib": memory,
        "disk_mib": disk / 2**20,
        "microseconds": times,
    }


def target_microseconds(rewards: TokenRewards, targets: list[Targets]) -> float:
    """CPU microseconds of a target's rewards."""
    started = time.process_time()
    for batch in targets:
        rewards.fetch(*batch)
    return 1e6 * (time.process_time() - started) / sum(len(users) for users, _ in targets)


def fit_mib(rows: list[dict[str, Any]], name: str, bytes_per_cell: float) -> tuple[float, float]:
    """(MiB that do not grow, MiB an item), after the moments' bytes are taken out.

    They are the least squares of the relative error.
    """
    y = np.array([row[name] - row["cells"] * bytes_per_cell / 2**20 for row in rows])
    features = np.array([[1.0, row["items"]] for row in rows]) / y[:, None]
    fixed, per_item = nnls(features, np.ones(len(rows)))[0]
    return float(fixed), float(per_item)


def predict(
    rows: list[dict[str, Any]], items: int, prefix_items: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(the predictions for `items`, the constants that they come from)."""
    cells = moment_cells(items, prefix_items)
    constants: dict[str, float] = {}
    predictions: dict[str, float] = {}
    for name, bytes_per_cell in (("memory", MOMENT_BYTES), ("disk", MOMENT_BYTES_ON_DISK)):
        fixed, per_item = fit_mib(rows, f"{name}_mib", bytes_per_cell)
        predictions[f"{name}_mib"] = fixed + per_item * items + cells * bytes_per_cell / 2**20
        constants[f"{name}_mib_fixed"] = fixed
        constants[f"{name}_bytes_per_item"] = per_item * 2**20
    points = [
        (work(row["items"], limit, width), spent)
        for row in rows
        for limit, width, spent in row["microseconds"]
    ]
    features = np.array([np.array(counts) / spent for counts, spent in points])
    costs = nnls(features, np.ones(len(points)))[0]
    predictions["microseconds"] = float(costs @ work(items, prefix_items, RewardOptions().width))
    constants |= dict(zip(COSTS, map(float, costs), strict=True))
    return predictions, constants


def measure_in_own_process(items: int) -> dict[str, Any]:
    print(f"measuring {items:,} items …", file=sys.stderr, flush=True)
    measured: dict[str, Any] = in_own_process(__file__, "--one", str(items), threads=1)
    return measured


def print_row(row: dict[str, Any]) -> None:
    spent = ", ".join(
        f"{value:.0f} µs (scans up to {limit:,}, width {width})"
        for limit, width, value in row["microseconds"]
    )
    print(
        f"{row['items']:>12,} items: {row['memory_mib']:,.0f} MiB, on disk "
        f"{row['disk_mib']:,.0f} MiB; a target {spent}"
    )


def print_errors(predictions: dict[str, float], measured: dict[str, Any]) -> dict[str, float]:
    """The relative errors of the predictions, printed beside them."""
    errors = {}
    for name, value in predictions.items():
        truth = measured[name] if name != "microseconds" else measured[name][0][2]
        errors[name] = value / truth - 1
        print(
            f"{name:<14} predicted {value:>10,.1f}  measured {truth:>10,.1f}  error "
            f"{errors[name]:+.1%} (limit ±{ERROR_LIMIT:.0%})"
        )
    return errors


def main() -> None:
    parser = command_line(
        __doc__, "fit on 10⁴ … 10⁵, predict 3·10⁵: that the script runs, not how well it predicts"
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    machine = describe_machine(threads=1)
    print(machine_line(machine), flush=True)
    fitted, predicted = [10_000, 100_000, 1_000_000], 10_000_000
    if arguments.quick:
        fitted, predicted = [10_000, 30_000, 100_000], 300_000
    rows = [measure_in_own_process(items) for items in fitted]
    measured = measure_in_own_process(predicted)
    predictions, constants = predict(rows, predicted, measured["stored"])
    for row in [*rows, measured]:
        print_row(row)
    print("constants: " + ", ".join(f"{name} {value:.4g}" for name, value in constants.items()))
    result = {
        "machine": machine,
        "rows": rows,
        "measured": measured,
        "predicted": predictions,
        "constants": constants,
        "errors": print_errors(predictions, measured),
    }
    write_figures(arguments.json, result)


if __name__ == "__main__":
    main()
