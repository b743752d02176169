"""What does splitting SASRec's item table save?  python benchmarks/cf.py [--quick] [--json FILE] [--items 2000000] [--parts 1 2 4]

Trains one full-softmax SASRec (64 wide, two layers) on random histories for a few steps, with its item table whole and in parts, each in a process of one
thread over gloo, and prints the seconds of a step, validation and writing left out, and the most memory that a process took beyond what it began with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.sasrec.fit import TrainingSequences, fit_sasrec
from ilrec_dist.cf.sasrec.sharded_table import ItemShard

LENGTH, BATCH = 9, 32
CONFIG = CFConfig(epochs=1, batch_size=BATCH)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train(part: int, parts: int, items: int, steps: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    if parts > 1:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=part, world_size=parts
        )
    users = BATCH * steps
    sequences = np.random.default_rng(0).integers(0, items, users * LENGTH).astype(np.int32)
    none = np.zeros(users, np.int64)  # no validation targets
    histories = TrainingSequences(
        sequences, np.arange(users) * LENGTH, np.full(users, LENGTH), none
    )
    seconds: list[float] = []
    before = peak_mib()
    began = time.perf_counter()
    report = fit_sasrec(
        CONFIG,
        ItemShard(items, part, parts),
        histories,
        Path(folder) / "model.safetensors",
        0,
        lambda event: seconds.append(event["seconds"]),
    )
    result = {
        "seconds_a_step": seconds[0] / steps,
        "peak_mib": peak_mib() - before,
        "whole_seconds": time.perf_counter() - began,
    }
    (Path(folder) / f"{part}.json").write_text(
        json.dumps(result | {"loss": report["curve"][0]["loss"]})
    )
    if parts > 1:
        dist.destroy_process_group()


def measure(items: int, parts: int, steps: int) -> dict[str, Any]:
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(train, (parts, items, steps, port, folder), nprocs=parts)
        found = [json.loads((Path(folder) / f"{part}.json").read_text()) for part in range(parts)]
    whole = {key: max(result[key] for result in found) for key in found[0]}
    return {"items": items, "parts": parts, "targets_a_step": BATCH * (LENGTH - 1), **whole}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="10⁵ items, under 50 seconds on two free cores"
    )
    parser.add_argument("--items", type=int, help="default 2·10⁶")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(machine, flush=True)
    rows = []
    for parts in arguments.parts:
        row = measure(
            arguments.items or (100_000 if arguments.quick else 2_000_000), parts, arguments.steps
        )
        rows.append(row)
        print(
            f"{row['items']:,} items in {parts} part{'s' * (parts > 1)}: {row['seconds_a_step']:.2f} s a step of {row['targets_a_step']} targets, "
            f"peak {row['peak_mib']:,.0f} MiB a process, loss {row['loss']:.4f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
