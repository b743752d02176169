"""What does a training step cost, where does it go, and what does ILRec add to SFT?  python benchmarks/train.py --quick

The real training path (backbone, loss operator, engine, prefetched batches, in-process rewards) over a drawn catalogue with random weights, where
the negatives are as many as they can be. Without a CONFIG two shapes are measured: a small recommender, whose vocabulary is its item tokens, and
an LLM-like one, whose item tokens are few against its vocabulary. "multiplications" is what ILRec's step must multiply over what SFT's must: no
implementation of the method can be below it where products bound the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.config.load import config_from_dict, load_config
from ilrec_dist.config.tree import Config

PARTS = ("data", "rewards", "forward", "loss", "backward", "optimizer", "communication")
# name → (configuration, whole vocabulary or 0 for the item tokens alone)
CPU_SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "small": (
        {
            "backbone": {"num_layers": 4, "hidden_size": 128, "num_heads": 4},
            "train": {"batch_size": 64},
        },
        0,
    ),
    "LLM-like": (
        {
            "backbone": {"num_layers": 8, "hidden_size": 512, "num_heads": 8},
            "train": {"batch_size": 8},
        },
        32_000,
    ),
}
CUDA_SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "small": (
        {
            "backbone": {"num_layers": 4, "hidden_size": 256, "num_heads": 4},
            "train": {"batch_size": 256},
        },
        0,
    ),
    "LLM-like": (
        {
            "backbone": {
                "num_layers": 16,
                "hidden_size": 2048,
                "num_heads": 32,
                "normalization": "RMSNorm",
                "activation": "swiglu",
                "bias": False,
            },
            "train": {"batch_size": 64, "precision": "bf16"},
            "objective": {"backend": "triton"},
        },
        128_256,
    ),
}
ITEMS, USERS, LEVELS, CODES = 10_000, 2_000, 4, 256


class Clock:
    """Seconds of a step by part. Time spent waiting in collectives counts as communication, not as the part it falls in."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.inside = device, 0.0
        self.parts: defaultdict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def mark(self, part: str) -> None:
        """What has passed since the last mark was `part`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part] += now - self.last - self.inside
        self.parts["communication"] += self.inside
        self.last, self.inside = now, 0.0

    def read(self) -> dict[str, float]:
        values, self.parts = dict(self.parts), defaultdict(float)
        return values


def count_collectives(clock: Clock) -> None:
    """Let torch.distributed's collectives tell the clock how long their callers waited."""

    def timed(call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            work = call(*args, **kwargs)
            clock.inside += time.perf_counter() - began
            return Waited(work) if kwargs.get("async_op") and work is not None else work

        return wrapped

    class Waited:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            began = time.perf_counter()
            self.work.wait()
            clock.inside += time.perf_counter() - began

    for name in (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "broadcast",
        "reduce",
        "reduce_scatter_tensor",
    ):
        setattr(dist, name, timed(getattr(dist, name)))


def draw(config: Config, vocab: int) -> tuple[Any, Any, Any, Any]:
    """(prepared, catalogue, trie, rewards) of random histories over random codes, with a CF model of random weights."""
    from ilrec_dist.cf.rewards.token_rewards import TokenRewards
    from ilrec_dist.cf.sasrec.model import SASRec
    from ilrec_dist.cf.sasrec.sharded_table import ItemShard
    from ilrec_dist.data.dataset import InteractionDataset
    from ilrec_dist.items.catalogue import make_catalogue
    from ilrec_dist.items.trie import Trie

    rng = np.random.default_rng(0)
    catalogue = make_catalogue(rng.integers(0, CODES, (ITEMS, LEVELS)), [CODES] * LEVELS)
    length = (
        config.train.max_history + 3
    )  # of which max_history + 1 items train: every window is full
    offsets = np.arange(USERS + 1, dtype=np.int64) * length
    dataset = InteractionDataset(
        rng.integers(0, ITEMS, USERS * length).astype(np.int32), offsets, range(USERS), range(ITEMS)
    )  # type: ignore[arg-type]
    trie = Trie(catalogue)
    torch.manual_seed(0)
    model = SASRec.from_config(config.cf, ItemShard(ITEMS)).eval()
    model.known.fill_(True)
    return (
        dataset,
        catalogue,
        trie,
        TokenRewards([model], np.zeros(USERS, np.int64), dataset, catalogue, trie),
    )


class Trainer:
    """One method's engine and batches, as the training loop has them."""

    def __init__(
        self,
        config: Config,
        method: str,
        vocab: int,
        parallel: Any,
        clock: Clock,
        drawn: tuple[Any, Any, Any, Any],
    ) -> None:
        from ilrec_dist.model.build import max_positions
        from ilrec_dist.model.gpt import Backbone
        from ilrec_dist.objective.ilrec import Objective
        from ilrec_dist.objective.metrics import LossStatistics
        from ilrec_dist.objective.registry import get_method
        from ilrec_dist.samples.collate import BatchMaker
        from ilrec_dist.samples.windows import training_windows
        from ilrec_dist.training.engine import build_engine

        self.config, self.parallel, self.clock, self.objective = (
            config,
            parallel,
            clock,
            get_method(method).objective(config.objective),
        )
        dataset, catalogue, trie, rewards = drawn
        vocab = max(vocab, catalogue.vocab_size)
        backbone = Backbone(
            config.backbone,
            vocab,
            max_positions(config.train.max_history, catalogue.depth),
            config.train.precision,
            0,
        )
        module = Objective(
            backbone,
            self.objective,
            config.backbone.num_layers,
            vocab,
            catalogue.used_tokens(),
            parallel,
        ).to(parallel.device)
        backbone.register_forward_hook(lambda *_: clock.mark("forward"))
        self.streams = 1 + module.num_intermediate
        self.trunk = (
            sum(p.numel() for p in backbone.parameters() if p.dim() == 2) * parallel.tp
            - backbone.padded_vocab_size * config.backbone.hidden_size
        )
        self.engine = build_engine(module, config.train, parallel)
        self.windows = training_windows(dataset, config.train.max_history, config.train.targets)
        self.maker = BatchMaker(dataset, catalogue, trie, self.windows)
        self.rewards = rewards if self.objective.crr_lambda > 0 and parallel.tp_rank == 0 else None
        layers = list(range(module.num_intermediate))
        self.statistics = LossStatistics(
            catalogue.depth, layers, self.objective.term_weights, parallel.device
        )
        self.vocab, self.items, self.depth = vocab, catalogue.vocab_size - 1, catalogue.depth

    def plan(self, steps: int) -> Iterator[tuple[np.ndarray, int]]:
        from ilrec_dist.samples.collate import micro_batches
        from ilrec_dist.samples.windows import EpochSteps

        train = self.config.train
        for numbers in EpochSteps(self.windows, train.batch_size, 0, 0)[:steps]:
            rows = self.windows.slices(numbers).num_targets * self.depth
            for part in micro_batches(
                numbers, self.parallel.dp_rank, self.parallel.dp, train.accumulation_steps
            ):
                yield part, rows

    def run(self, steps: int) -> Iterator[dict[str, float]]:
        """Takes steps, one at each turn; gives seconds by part, "all" and "tokens"."""
        from ilrec_dist.samples.prefetch import prefetch

        clock = self.clock
        batches = prefetch(self.plan(steps), self.maker.make, self.rewards)
        for _ in range(steps):
            clock.mark("between")
            clock.read()
            began, tokens = time.perf_counter(), 0
            for _ in range(self.config.train.accumulation_steps):
                ready = next(batches)
                clock.mark("data")
                wanted = self.objective.crr_lambda > 0
                rewards = ready.reward_tensor(self.parallel) if wanted else None
                clock.mark("rewards")
                scale = (
                    self.parallel.dp * self.config.train.accumulation_steps / ready.batch.step_rows
                )
                output = self.engine(
                    *ready.batch.model_inputs(self.parallel.device), rewards, scale
                )
                clock.mark("loss")
                self.engine.backward(output.loss)
                clock.mark("backward")
                self.statistics.add(output.rows, ready.batch.num_tokens, ready.batch.grid_index)
                self.engine.step()
                clock.mark("optimizer")
                tokens += ready.batch.num_tokens * self.parallel.dp
                self.rows, self.sequences, self.length = (
                    len(ready.batch.targets),
                    *ready.batch.tokens.shape,
                )
            yield clock.read() | {"all": time.perf_counter() - began, "tokens": tokens}
        batches.close()

    def multiplications(self) -> float:
        """Of a step's products, forward and backward."""
        d, tokens = self.config.backbone.hidden_size, self.sequences * self.length
        attention = 4 * self.config.backbone.num_layers * tokens * self.length * d
        head = self.vocab + (self.streams - 1) * (self.items if self.objective.cpd_mu > 0 else 0)
        return 3 * (2 * self.trunk * tokens + attention + 2 * self.rows * d * head)


def _worker(
    rank: int, tree: dict[str, Any], vocab: int, args: argparse.Namespace, port: int, queue: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(args.tp),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from ilrec_dist.launch.device import quiet

    quiet()
    from ilrec_dist.distributed.process_groups import initialize_parallel

    config = config_from_dict(tree)
    torch.set_num_threads(config.launch.threads or max(1, len(os.sched_getaffinity(0)) // args.tp))
    parallel = initialize_parallel(args.tp, args.device)
    clock = Clock(parallel.device)
    count_collectives(clock)
    drawn = draw(config, vocab)
    trainers = {
        method: Trainer(config, method, vocab, parallel, clock, drawn)
        for method in ("sft", "ilrec")
    }
    runs = {method: trainer.run(args.steps + 1) for method, trainer in trainers.items()}
    found: dict[str, list[dict[str, float]]] = {method: [] for method in trainers}
    for turn in range(
        args.steps + 1
    ):  # a step of each in turn, so that a drifting machine does not favour one
        for method, run in runs.items():
            step = next(run)
            if turn:  # the first warms up
                found[method].append(step)
        if rank == 0:
            print(
                f"step {turn} of {args.steps}: "
                + ", ".join(f"{m} {1e3 * s[-1]['all']:.0f} ms" for m, s in found.items() if s),
                flush=True,
            )
    if rank == 0:
        bound = trainers["ilrec"].multiplications() / trainers["sft"].multiplications()
        queue.put((found, bound, torch.get_num_threads()))
    dist.barrier()
    os._exit(0)  # interpreter shutdown with live gloo groups can hang


def measure(
    config: Config, vocab: int, args: argparse.Namespace
) -> tuple[dict[str, list[dict[str, float]]], float, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").Queue()
    context = mp.spawn(
        _worker, (config_to_dict(config), vocab, args, port, queue), nprocs=args.tp, join=False
    )
    while queue.empty():
        context.join(timeout=0.2)  # raises what a worker raised
    answer = queue.get()
    while not context.join():
        pass
    return answer


def report(name: str, config: Config, vocab: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    found, bound, threads = measure(config, vocab, args)
    b = config.backbone
    machine = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.processor() or platform.machine()}, {threads} threads a process"
    )
    print(
        f"\n{name}: {b.num_layers} layers of {b.hidden_size}, {max(vocab, LEVELS * CODES + 1):,} tokens, {LEVELS * CODES:,} of them items', tp {args.tp}"
    )
    print(
        f"{machine}; torch {torch.__version__}; median of {args.steps} steps, ms\n{'':<8}{'step':>9}{'tokens/s':>11}"
        + "".join(f"{p:>14}" for p in PARTS)
    )
    rows: list[dict[str, Any]] = []
    for method, steps in found.items():
        middle = {
            key: statistics.median(step.get(key, 0.0) for step in steps)
            for key in ("all", "tokens", *PARTS)
        }
        rate = middle["tokens"] / middle["all"]
        print(
            f"{method:<8}{1e3 * middle['all']:>9.1f}{rate:>11,.0f}"
            + "".join(f"{1e3 * middle[p]:>14.1f}" for p in PARTS)
        )
        rows.append(
            {
                "shape": name,
                "method": method,
                "step_ms": 1e3 * middle["all"],
                "tokens_per_second": rate,
                **{f"{p}_ms": 1e3 * middle[p] for p in PARTS},
            }
        )
    ratio = rows[1]["step_ms"] / rows[0]["step_ms"]
    print(f"ILRec's step is {ratio:.2f} × SFT's; multiplications {bound:.2f} ×")
    for row in rows:
        row |= {"ilrec_over_sft": ratio, "multiplications_over_sft": bound}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/train.py configs/quickstart.yaml backbone.hidden_size=256 --vocab 32000 --steps 10",
    )
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="backbone, objective and training settings; data are drawn",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument(
        "--vocab",
        type=int,
        default=0,
        help="with a CONFIG: tokens in all (default: the item tokens alone)",
    )
    parser.add_argument("--steps", type=int, help="of each method (default 16; 4 with --quick)")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--quick", action="store_true", help="few steps, under 50 s on 2 cores")
    parser.add_argument("--json", metavar="FILE", help="write the rows")
    args = parser.parse_intermixed_args()
    args.steps = args.steps or (4 if args.quick else 16)
    shapes = {
        name: (config_from_dict(tree), vocab)
        for name, (tree, vocab) in (CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES).items()
    }
    if args.config:
        shapes = {Path(args.config).stem: (load_config(args.config, args.overrides), args.vocab)}
    rows = []
    for name, (config, vocab) in shapes.items():
        if args.quick:
            config = dataclasses.replace(
                config,
                train=dataclasses.replace(
                    config.train, batch_size=min(config.train.batch_size, 32 if vocab == 0 else 4)
                ),
            )
        rows += report(name, config, vocab, args)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
