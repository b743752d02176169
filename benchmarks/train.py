"""What does a training step cost, where does it go, and what does ILRec add to SFT?

    python benchmarks/train.py [CONFIG] [--quick] [--json FILE]

The real training path (backbone, loss operator, engine, prefetched batches, in-process
rewards) runs over a drawn catalogue with random weights, where the negatives are as
many as they can be. Without a CONFIG two shapes are measured: a small recommender,
whose vocabulary is its item tokens, and an LLM-like one, whose item tokens are few
against its vocabulary. "multiplications" is what ILRec's step must multiply over what
SFT's must: no implementation of the method can be below it where products bound the
step.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from harness import (
    NumberedIds,
    command_line,
    describe_machine,
    machine_line,
    set_rank,
    worker_group,
    write_figures,
)

from ilrec_dist.cf.rewards.token_rewards import TokenRewards
from ilrec_dist.cf.sasrec.model import SASRec
from ilrec_dist.cf.sasrec.sharded_table import ItemShard
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.config.load import config_from_dict, load_config
from ilrec_dist.config.tree import Config
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import initialize_parallel
from ilrec_dist.items.catalogue import Catalogue, make_catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.launch.device import default_threads, quiet
from ilrec_dist.model.build import build_backbone
from ilrec_dist.model.decoder import max_positions
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.objective.registry import get_method
from ilrec_dist.samples.collate import Batch, BatchMaker
from ilrec_dist.samples.prefetch import micro_batch_plan, prefetch
from ilrec_dist.samples.windows import StepOrder, training_windows
from ilrec_dist.training.engine import build_engine

PARTS = ("data", "rewards", "forward", "loss", "backward", "optimizer", "communication")
# By name, the configuration and the whole vocabulary, which is 0 for the item tokens alone.
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
METHODS = ("sft", "ilrec")
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "reduce",
    "reduce_scatter_tensor",
)

# Seconds by part, with "all" and "tokens".
Step = dict[str, float]


class Clock:
    """Seconds of a step by part.

    Time spent waiting in collectives counts as
    communication, not as the part it falls in.
    """

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
    """Make torch.distributed's collectives tell
    the clock how long their callers waited.
    """

    def timed(call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            work = call(*args, **kwargs)
            clock.inside += time.perf_counter() - started
            return Waited(work) if kwargs.get("async_op") and work is not None else work

        return wrapped

    class Waited:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            started = time.perf_counter()
            self.work.wait()
            clock.inside += time.perf_counter() - started

    for name in COLLECTIVES:
        setattr(dist, name, timed(getattr(dist, name)))


@dataclass(frozen=True)
class DrawnData:
    """Random histories over random codes, with a CF model of random weights."""

    dataset: InteractionDataset
    catalogue: Catalogue
    trie: Trie
    rewards: TokenRewards


def draw(config: Config) -> DrawnData:
    rng = np.random.default_rng(0)
    catalogue = make_catalogue(rng.integers(0, CODES, (ITEMS, LEVELS)), [CODES] * LEVELS)
    # Of these max_history + 1 items train, so that every window is full.
    length = config.train.max_history + 3
    offsets = np.arange(USERS + 1, dtype=np.int64) * length
    items = rng.integers(0, ITEMS, USERS * length).astype(np.int32)
    dataset = InteractionDataset(items, offsets, NumberedIds(USERS), NumberedIds(ITEMS))
    trie = Trie(catalogue)
    torch.manual_seed(0)
    model = SASRec.from_config(config.cf, ItemShard(ITEMS)).eval()
    model.known.fill_(True)
    rewards = TokenRewards([model], np.zeros(USERS, np.int64), dataset, catalogue, trie)
    return DrawnData(dataset, catalogue, trie, rewards)


class MeasuredTraining:
    """One method's engine and batches, as the training loop has them."""

    def __init__(
        self,
        config: Config,
        method: str,
        vocab: int,
        parallel: ParallelState,
        clock: Clock,
        data: DrawnData,
    ) -> None:
        self.config, self.parallel, self.clock = config, parallel, clock
        self.objective = get_method(method).objective(config.objective)
        catalogue = data.catalogue
        self.vocab, self.item_tokens = max(vocab, catalogue.vocab_size), catalogue.vocab_size - 1
        positions = max_positions(config.train.max_history, catalogue.depth)
        backbone = build_backbone(
            config.backbone, self.vocab, positions, config.train.precision, seed=0
        )
        module = CrossLayerObjective(
            backbone,
            self.objective,
            config.backbone.num_layers,
            self.vocab,
            catalogue.used_tokens(),
            parallel,
        ).to(parallel.device)
        backbone.register_forward_hook(lambda *_: clock.mark("forward"))
        self.streams = 1 + module.num_intermediate
        # Weights of the matrices, without the head.
        self.trunk = (
            sum(weight.numel() for weight in backbone.parameters() if weight.dim() == 2)
            * parallel.tp
            - backbone.padded_vocab_size * config.backbone.hidden_size
        )
        self.engine = build_engine(module, config.train, parallel)
        windows = training_windows(data.dataset, config.train.max_history, config.train.targets)
        self.order = StepOrder(windows, config.train.batch_size, config.train.epochs, seed=0)
        self.maker = BatchMaker(data.dataset, catalogue, data.trie, windows)
        self.needs_rewards = self.objective.crr_lambda > 0
        asks = self.needs_rewards and parallel.tp_rank == 0
        self.rewards = data.rewards if asks else None
        self.statistics = module.make_statistics(catalogue.depth)
        self.last_batch: Batch | None = None

    def run(self, steps: int) -> Iterator[Step]:
        """Take a step at each turn."""
        clock, accumulation = self.clock, self.config.train.accumulation_steps
        plan = micro_batch_plan(self.order, self.maker, 0, steps, accumulation, self.parallel)
        batches = prefetch(plan, self.maker.make, self.rewards)
        for _ in range(steps):
            clock.mark("between")
            clock.read()
            started, tokens = time.perf_counter(), 0
            for _ in range(accumulation):
                prefetched = next(batches)
                batch = prefetched.batch
                clock.mark("data")
                rewards = prefetched.reward_tensor(self.parallel) if self.needs_rewards else None
                clock.mark("rewards")
                scale = self.parallel.dp * accumulation / batch.step_rows
                output = self.engine(
                    *batch.model_inputs(self.parallel.device), rewards=rewards, loss_scale=scale
                )
                clock.mark("loss")
                self.engine.backward(output.loss)
                clock.mark("backward")
                self.statistics.add(output.rows, batch.num_tokens, batch.grid_index)
                self.engine.step()
                clock.mark("optimizer")
                tokens += batch.num_tokens * self.parallel.dp
                self.last_batch = batch
            yield clock.read() | {"all": time.perf_counter() - started, "tokens": tokens}
        batches.close()

    def multiplications(self) -> float:
        """Of the last step's products, forward and backward."""
        assert self.last_batch is not None
        rows, (sequences, length) = len(self.last_batch.targets), self.last_batch.tokens.shape
        d, tokens = self.config.backbone.hidden_size, sequences * length
        attention = 4 * self.config.backbone.num_layers * tokens * length * d
        distilled = self.item_tokens if self.objective.cpd_mu > 0 else 0
        head = self.vocab + (self.streams - 1) * distilled
        return 3 * (2 * self.trunk * tokens + attention + 2 * rows * d * head)


def worker(
    rank: int,
    tree: dict[str, Any],
    vocab: int,
    arguments: argparse.Namespace,
    port: int,
    queue: Any,
) -> None:
    """Rank 0 puts (the steps of each method, multiplications over SFT's, threads)."""
    set_rank(rank, arguments.tp, port)
    quiet()
    config = config_from_dict(tree)
    torch.set_num_threads(config.launch.threads or default_threads(arguments.tp))
    parallel = initialize_parallel(arguments.tp, arguments.device)
    clock = Clock(parallel.device)
    count_collectives(clock)
    data = draw(config)
    trainings = {
        method: MeasuredTraining(config, method, vocab, parallel, clock, data) for method in METHODS
    }
    steps = take_steps(trainings, arguments.steps, rank == 0)
    if rank == 0:
        bound = trainings["ilrec"].multiplications() / trainings["sft"].multiplications()
        queue.put((steps, bound, torch.get_num_threads()))
    dist.barrier()
    # Interpreter shutdown with live gloo groups can hang.
    os._exit(0)


def take_steps(
    trainings: dict[str, MeasuredTraining], count: int, show: bool
) -> dict[str, list[Step]]:
    """`count` steps of each method, after one that warms up.

    A step of each is taken in turn, so that a drifting machine favours none.
    """
    runs = {method: training.run(count + 1) for method, training in trainings.items()}
    steps: dict[str, list[Step]] = {method: [] for method in trainings}
    for repeat in range(count + 1):
        for method, run in runs.items():
            step = next(run)
            if repeat > 0:
                steps[method].append(step)
        if show and repeat > 0:
            last = [f"{method} {1e3 * taken[-1]['all']:.0f} ms" for method, taken in steps.items()]
            print(f"step {repeat} of {count}: {', '.join(last)}", flush=True)
    return steps


def measure(
    name: str, config: Config, vocab: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A printed row for each method."""
    workers = (config_to_dict(config), vocab, arguments)
    with worker_group(worker, arguments.tp, workers) as receive:
        steps, bound, threads = receive()
    backbone = config.backbone
    print(
        f"\n{name}: {backbone.num_layers} layers of {backbone.hidden_size}, "
        f"{max(vocab, LEVELS * CODES + 1):,} tokens, {LEVELS * CODES:,} of them items', "
        f"tp {arguments.tp}, {threads} threads a process; median of {arguments.steps} steps, ms"
    )
    print(f"{'':<8}{'step':>9}{'tokens/s':>11}" + "".join(f"{part:>14}" for part in PARTS))
    rows = [summarise(name, method, taken) for method, taken in steps.items()]
    for row in rows:
        print(
            f"{row['method']:<8}{row['step_ms']:>9.1f}{row['tokens_per_second']:>11,.0f}"
            + "".join(f"{row[f'{part}_ms']:>14.1f}" for part in PARTS)
        )
    ratio = rows[1]["step_ms"] / rows[0]["step_ms"]
    print(f"ILRec's step is {ratio:.2f} × SFT's; multiplications {bound:.2f} ×")
    return [
        row | {"ilrec_over_sft": ratio, "multiplications_over_sft": bound, "threads": threads}
        for row in rows
    ]


def summarise(shape: str, method: str, steps: list[Step]) -> dict[str, Any]:
    """The medians of a method's steps."""
    medians = {
        key: statistics.median(step.get(key, 0.0) for step in steps)
        for key in ("all", "tokens", *PARTS)
    }
    return {
        "shape": shape,
        "method": method,
        "step_ms": 1e3 * medians["all"],
        "tokens_per_second": medians["tokens"] / medians["all"],
        **{f"{part}_ms": 1e3 * medians[part] for part in PARTS},
    }


def shrink(config: Config, vocab: int) -> Config:
    """The same shape with the batch of --quick."""
    largest = 32 if vocab == 0 else 4
    batch_size = min(config.train.batch_size, largest)
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=batch_size)
    )


def main() -> None:
    parser = command_line(
        __doc__,
        "few steps, under 50 seconds on two free cores",
        "python benchmarks/train.py configs/quickstart.yaml backbone.hidden_size=256 "
        "--vocab 32000 --steps 10",
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
    arguments = parser.parse_intermixed_args()
    arguments.steps = arguments.steps or (4 if arguments.quick else 16)
    cuda = arguments.device == "cuda"
    shapes = {
        name: (config_from_dict(tree), vocab)
        for name, (tree, vocab) in (CUDA_SHAPES if cuda else CPU_SHAPES).items()
    }
    if arguments.config:
        config = load_config(arguments.config, arguments.overrides)
        shapes = {Path(arguments.config).stem: (config, arguments.vocab)}
    machine = describe_machine(**({"device": torch.cuda.get_device_name()} if cuda else {}))
    print(machine_line(machine), flush=True)
    rows = []
    for name, (config, vocab) in shapes.items():
        rows += measure(
            name, shrink(config, vocab) if arguments.quick else config, vocab, arguments
        )
    write_figures(arguments.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
