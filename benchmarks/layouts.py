"""Do two tensor-parallel layouts train alike? `python benchmarks/layouts.py configs/instruments-small.yaml --steps 50` (METHOD.md §7).

The same weights and batches go through tp = 1 and tp = 2, one optimizer step after the other; printed are the largest difference of a step's loss and
the share of rows whose set of negatives H is the same. The run's prepare, index and cf stages must be done (`ilrec cf CONFIG`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.console import console
from ilrec_dist.config.load import config_from_dict, load_config
from ilrec_dist.config.tree import Config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--tp", type=int, default=2, help="the layout that is held against tp = 1 (default 2)"
    )
    parser.add_argument("--quick", action="store_true", help="8 steps of 16 sequences")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    config = dataclasses.replace(config, runs_dir=str(Path(config.runs_dir).resolve()))
    if args.quick:
        args.steps, config = (
            8,
            dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=16)),
        )
    alone, split = (run(config, tp, args.steps) for tp in (1, args.tp))
    figures = compare(alone, split)
    console.print(
        f"torch {torch.__version__}, CPU, fp32, {args.steps} steps, {figures['rows']:,} rows, {figures['rows_with_negatives']:,} with negatives"
    )
    console.print(
        f"largest difference of a step's loss, tp 1 against {args.tp}: {figures['loss_difference']:.2e}"
    )
    console.print(f"rows with the same H: {100 * figures['same_negatives']:.4f} %", highlight=False)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def run(config: Config, tp: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(loss of each step, fingerprint of every row's H) in a layout of `tp` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(
        _worker, (config_to_dict(config), tp, steps, port, queue), nprocs=tp, join=False
    )
    losses: list[float] = []
    keys: list[np.ndarray] = []
    while len(losses) < steps:
        if queue.empty():
            context.join(timeout=0.2)  # raises what a worker raised
            continue
        loss, key = queue.get()
        losses.append(loss)
        keys.append(key)
    while not context.join():
        pass
    return np.array(losses), np.concatenate(keys)


def _worker(rank: int, tree: dict, tp: int, steps: int, port: int, queue: mp.SimpleQueue) -> None:  # type: ignore[type-arg]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(tp),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from ilrec_dist.launch.device import quiet

    quiet()
    from ilrec_dist.distributed.process_groups import initialize_parallel
    from ilrec_dist.objective.ilrec import Objective
    from ilrec_dist.pipeline.artifacts import RunArtifacts, build_backbone
    from ilrec_dist.samples.collate import BatchMaker
    from ilrec_dist.samples.prefetch import PrefetchedBatch
    from ilrec_dist.samples.windows import EpochSteps, steps_per_epoch, training_windows
    from ilrec_dist.training.engine import build_engine
    from ilrec_dist.training.schedule import learning_rate

    config = config_from_dict(tree)
    torch.set_num_threads(config.launch.threads or 1)
    parallel = initialize_parallel(tp, "cpu")
    artifacts = RunArtifacts(config)
    catalogue, backbone = artifacts.catalogue, build_backbone(config, artifacts, seed=0)
    module = Objective(
        backbone,
        config.objective,
        config.backbone.num_layers,
        catalogue.vocab_size,
        catalogue.used_tokens(),
        parallel,
    )
    engine = build_engine(module, config.train, parallel)
    windows = training_windows(artifacts.training, config.train.max_history, config.train.targets)
    length = steps_per_epoch(windows, config.train.batch_size)
    maker = BatchMaker(artifacts.training, artifacts.catalogue, artifacts.trie, windows)
    rewards = artifacts.reward_source() if parallel.tp_rank == 0 else None
    module.train()
    began = time.monotonic()
    for step in range(steps):
        epoch, place = divmod(step, length)
        numbers = EpochSteps(windows, config.train.batch_size, 0, epoch)[place]
        batch = maker.make(numbers, windows.slices(numbers).num_targets * artifacts.catalogue.depth)
        ready = PrefetchedBatch(
            batch,
            rewards.fetch_async(batch.users, batch.positions) if rewards is not None else None,
        )
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(config.train, step, length * config.train.epochs)
        torch.manual_seed(step)
        output = engine(
            *batch.model_inputs(parallel.device),
            ready.reward_tensor(parallel),
            1 / batch.step_rows,
        )
        engine.backward(output.loss)
        engine.step()
        if rank == 0:
            queue.put((float(output.loss), output.rows.negatives_key.numpy()))
            rate = (step + 1) / (time.monotonic() - began)
            print(
                f"\rtp {tp}: step {step + 1}/{steps} · {rate:.2f}/s",
                end="" if step + 1 < steps else "\n",
                flush=True,
            )
    torch.distributed.barrier()
    os._exit(0)  # interpreter shutdown with live gloo groups can hang


def compare(
    alone: tuple[np.ndarray, np.ndarray], split: tuple[np.ndarray, np.ndarray]
) -> dict[str, float]:
    (losses, keys), (other_losses, other_keys) = alone, split
    return {
        "steps": len(losses),
        "rows": len(keys),
        "rows_with_negatives": int((keys != 0).sum()),
        "loss_difference": float(np.abs(losses - other_losses).max()),
        "same_negatives": float((keys == other_keys).mean()),
        "same_negatives_where_any": float(
            (keys == other_keys)[(keys != 0) | (other_keys != 0)].mean()
        ),
    }


if __name__ == "__main__":
    main()
