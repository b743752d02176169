"""Do two tensor-parallel layouts train alike (METHOD.md §7)?

    python benchmarks/layouts.py configs/instruments-small.yaml [--quick] [--steps 50]

The same weights and batches go through tp = 1 and tp = 2, one optimizer step after the
other. Printed are the largest difference of a step's loss and the share of rows whose
set of negatives H is the same. The run's prepare, index and cf stages must be done
(`ilrec cf CONFIG`).
"""

from __future__ import annotations

import dataclasses
import os
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
    set_rank,
    worker_group,
    write_figures,
)

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.config.load import config_from_dict, load_config
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.process_groups import initialize_parallel
from ilrec_dist.launch.device import quiet
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.backbones import initial_backbone
from ilrec_dist.pipeline.reward_source import open_reward_source
from ilrec_dist.samples.collate import BatchMaker
from ilrec_dist.samples.prefetch import PrefetchedBatch
from ilrec_dist.samples.windows import StepOrder, training_windows
from ilrec_dist.training.engine import build_engine
from ilrec_dist.training.schedule import learning_rate


def train_layout(config: Config, tp: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(loss of each step, fingerprint of every
    row's H) in a layout of `tp` processes.
    """
    with worker_group(worker, tp, (config_to_dict(config), tp, steps)) as receive:
        answers = [receive() for _ in range(steps)]
    losses, keys = zip(*answers, strict=True)
    return np.array(losses), np.concatenate(keys)


def worker(rank: int, tree: dict[str, Any], tp: int, steps: int, port: int, queue: Any) -> None:
    """Train one rank of a layout; rank 0 puts
    (loss, keys of the negatives) of each step.
    """
    set_rank(rank, tp, port)
    quiet()
    config = config_from_dict(tree)
    torch.set_num_threads(config.launch.threads or 1)
    parallel = initialize_parallel(tp, "cpu")
    artifacts = RunArtifacts(config)
    catalogue = artifacts.catalogue
    backbone = initial_backbone(config, artifacts, seed=0)
    module = CrossLayerObjective.build(backbone, config.objective, catalogue, parallel)
    engine = build_engine(module, config.train, parallel)
    windows = training_windows(artifacts.training, config.train.max_history, config.train.targets)
    order = StepOrder(windows, config.train.batch_size, config.train.epochs, seed=0)
    maker = BatchMaker(artifacts.training, catalogue, artifacts.trie, windows)
    rewards = open_reward_source(artifacts) if parallel.tp_rank == 0 else None
    module.train()
    started = time.monotonic()
    for step in range(steps):
        sample_ids = order.sample_ids(step)
        batch = maker.make(sample_ids, maker.num_rows(sample_ids))
        future = rewards.fetch_async(batch.users, batch.positions) if rewards is not None else None
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(config.train, step, order.total_steps)
        # Dropout draws the same in both layouts.
        torch.manual_seed(step)
        output = engine(
            *batch.model_inputs(parallel.device),
            rewards=PrefetchedBatch(batch, future).reward_tensor(parallel),
            loss_scale=1 / batch.step_rows,
        )
        engine.backward(output.loss)
        engine.step()
        if rank == 0:
            queue.put((float(output.loss), output.rows.negatives_key.numpy()))
            show_progress(tp, step + 1, steps, started)
    dist.barrier()
    # Interpreter shutdown with live gloo groups can hang.
    os._exit(0)


def show_progress(tp: int, step: int, steps: int, started: float) -> None:
    rate = step / (time.monotonic() - started)
    end = "" if step < steps else "\n"
    print(f"\rtp {tp}: step {step}/{steps} · {rate:.2f}/s", end=end, flush=True)


def compare(
    alone: tuple[np.ndarray, np.ndarray], split: tuple[np.ndarray, np.ndarray]
) -> dict[str, float]:
    """The figures of two layouts' losses and keys of negatives."""
    (losses, keys), (other_losses, other_keys) = alone, split
    same = keys == other_keys
    return {
        "steps": len(losses),
        "rows": len(keys),
        "rows_with_negatives": int((keys != 0).sum()),
        "loss_difference": float(np.abs(losses - other_losses).max()),
        "same_negatives": float(same.mean()),
        "same_negatives_where_any": float(same[(keys != 0) | (other_keys != 0)].mean()),
    }


def main() -> None:
    parser = command_line(__doc__, "8 steps of 16 sequences")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--steps", type=int, help="optimizer steps (default 50)")
    parser.add_argument(
        "--tp", type=int, default=2, help="the layout that is compared with tp = 1 (default 2)"
    )
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    config = dataclasses.replace(config, runs_dir=str(Path(config.runs_dir).resolve()))
    if arguments.quick:
        train = dataclasses.replace(config.train, batch_size=16)
        config = dataclasses.replace(config, train=train)
    steps = arguments.steps or (8 if arguments.quick else 50)
    machine = describe_machine()
    print(machine_line(machine), flush=True)
    alone, split = (train_layout(config, tp, steps) for tp in (1, arguments.tp))
    figures = compare(alone, split)
    print(
        f"CPU, fp32, {steps} steps, {figures['rows']:,} rows, "
        f"{figures['rows_with_negatives']:,} with negatives"
    )
    print(
        f"largest difference of a step's loss, tp 1 against {arguments.tp}: "
        f"{figures['loss_difference']:.2e}"
    )
    print(f"rows with the same H: {100 * figures['same_negatives']:.4f} %")
    write_figures(arguments.json, {"machine": machine, **figures})


if __name__ == "__main__":
    main()
