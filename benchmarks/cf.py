"""What does splitting SASRec's item table save?

    python benchmarks/cf.py [--quick] [--json FILE] [--items 2000000] [--parts 1 2 4]

Trains one full-softmax SASRec (64 wide, two layers) on random histories for a few
steps, with its item table whole and in parts, each in a process of one thread over
gloo. It prints the seconds of a step, validation and writing left out, and the most
memory that a process took beyond what it began with.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from harness import (
    command_line,
    describe_machine,
    machine_line,
    peak_mib,
    set_rank,
    worker_group,
    write_figures,
)

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.sasrec.fit import TrainingSequences, fit_sasrec
from ilrec_dist.cf.sasrec.sharded_table import ItemShard

LENGTH, BATCH = 9, 32
CONFIG = CFConfig(epochs=1, batch_size=BATCH)


def train_part(
    part: int, parts: int, items: int, steps: int, folder: str, port: int, queue: Any
) -> None:
    """Train with one part of the table; puts this process's figures into the queue."""
    torch.set_num_threads(1)
    if parts > 1:
        set_rank(part, parts, port)
        dist.init_process_group("gloo")
    users = BATCH * steps
    sequences = np.random.default_rng(0).integers(0, items, users * LENGTH).astype(np.int32)
    no_validation_targets = np.zeros(users, np.int64)
    histories = TrainingSequences(
        sequences, np.arange(users) * LENGTH, np.full(users, LENGTH), no_validation_targets
    )
    seconds: list[float] = []
    before = peak_mib()
    started = time.perf_counter()
    report = fit_sasrec(
        CONFIG,
        ItemShard(items, part, parts),
        histories,
        Path(folder) / "model.safetensors",
        0,
        lambda event: seconds.append(event["seconds"]),
    )
    figures = {
        "seconds_a_step": seconds[0] / steps,
        "peak_mib": peak_mib() - before,
        "whole_seconds": time.perf_counter() - started,
        "loss": report["curve"][0]["loss"],
    }
    queue.put(figures)
    if parts > 1:
        dist.destroy_process_group()


def measure(items: int, parts: int, steps: int) -> dict[str, Any]:
    """The largest figures of all processes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        worker_group(train_part, parts, (parts, items, steps, folder)) as receive,
    ):
        figures = [receive() for _ in range(parts)]
    largest = {key: max(process[key] for process in figures) for key in figures[0]}
    return {"items": items, "parts": parts, "targets_a_step": BATCH * (LENGTH - 1), **largest}


def main() -> None:
    parser = command_line(__doc__, "10⁵ items, under 50 seconds on two free cores")
    parser.add_argument("--items", type=int, help="items of the table (default 2·10⁶)")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    items = arguments.items or (100_000 if arguments.quick else 2_000_000)
    machine = describe_machine()
    print(machine_line(machine), flush=True)
    rows = []
    for parts in arguments.parts:
        rows.append(row := measure(items, parts, arguments.steps))
        print(
            f"{items:,} items in {parts} part{'s' * (parts > 1)}: {row['seconds_a_step']:.2f} s a "
            f"step of {row['targets_a_step']} targets, peak {row['peak_mib']:,.0f} MiB a process, "
            f"loss {row['loss']:.4f}",
            flush=True,
        )
    write_figures(arguments.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
