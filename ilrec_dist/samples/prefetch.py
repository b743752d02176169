"""Makes batches in a thread and asks for their
rewards, ahead of the steps that use them.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from ilrec_dist.cf.rewards.futures import RewardFuture, RewardSource
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.samples.collate import Batch
from ilrec_dist.samples.micro_batches import PlannedBatch, micro_batches, within_budget
from ilrec_dist.samples.windows import SampleSet, StepOrder

# How long the thread that makes batches may keep the interpreter from the training thread, in
# seconds. Python's default of 5 ms delays the training.
SWITCH_SECONDS = 2e-4
# How long the thread waits for room in the queue before it looks whether it is to stop.
PUT_SECONDS = 0.2
JOIN_SECONDS = 10


class BatchSource(Protocol):
    """Makes batches of samples: `collate.BatchMaker`,
    `prompt_batches.PromptBatchMaker`.
    """

    @property
    def samples(self) -> SampleSet:
        """What an epoch goes through."""
        ...

    def make(self, sample_ids: np.ndarray, step_rows: int) -> Batch:
        """The micro-batch of these samples (int64 [B]), possibly none of them."""
        ...

    @property
    def packs(self) -> bool:
        """Whether its batches may go through the layers without their padding."""
        ...

    def num_tokens(self, sample_ids: np.ndarray) -> np.ndarray:
        """int64 [n]: the input tokens of each sample, at most."""
        ...

    def num_rows(self, sample_ids: np.ndarray) -> int:
        """Response rows of these samples."""
        ...


@dataclass(frozen=True)
class PrefetchedBatch:
    """A batch, and the rewards that were asked for when it was made."""

    batch: Batch
    rewards: RewardFuture | None
    # This rank's micro-batches of the optimizer step.
    in_step: int = 1

    def reward_tensor(self, parallel: ParallelState) -> torch.Tensor:
        """The rewards of candidates, float32
        [num_rewards], on every rank of the tp group.

        The group's first rank waits for them and broadcasts them to the others.
        """
        if self.rewards is None:
            values = torch.empty(self.batch.num_rewards)
        else:
            answer = np.asarray(self.rewards.result(), dtype=np.float32)
            mask = self.batch.reward_mask
            values = torch.from_numpy(answer if mask is None else answer[mask])
        values = values.to(parallel.device)
        if parallel.tp > 1:
            dist.broadcast(values, group=parallel.tp_group, group_src=0)
        return values


def micro_batch_plan(
    order: StepOrder,
    maker: BatchSource,
    first_step: int,
    last_step: int,
    accumulation: int,
    parallel: ParallelState,
    budget: int | None = None,
) -> Iterator[PlannedBatch]:
    """This rank's micro-batches of steps [first, last).

    A step has `accumulation` of them, or as many as
    its samples take with at most `budget` tokens each.
    """
    for step in range(first_step, last_step):
        sample_ids = order.sample_ids(step)
        step_rows = maker.num_rows(sample_ids)
        parts = micro_batches(sample_ids, parallel.dp_rank, parallel.dp, accumulation)
        if budget is not None:
            (share,) = parts
            tokens = maker.num_tokens(share)
            parts = [share[part] for part in within_budget(tokens, budget, maker.packs)]
        for part in parts:
            yield PlannedBatch(part, step_rows, len(parts))


def prefetch(
    plan: Iterator[PlannedBatch],
    make: Callable[[np.ndarray, int], Batch],
    rewards: RewardSource | None,
    ahead: int = 4,
) -> Generator[PrefetchedBatch, None, None]:
    """Make the planned micro-batches in a thread, at most `ahead` before their use.

    Their rewards are asked for as soon as a batch is made;
    with no `rewards` they are not. An error in the thread is
    raised here. Close the generator to end the thread early.
    """
    results: queue.Queue[PrefetchedBatch | BaseException | None] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(result: PrefetchedBatch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return results.put(result, timeout=PUT_SECONDS)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for planned in plan:
                if stop.is_set():
                    return
                batch = make(planned.sample_ids, planned.step_rows)
                future = None
                if rewards is not None:
                    future = rewards.fetch_async(batch.users, batch.positions)
                put(PrefetchedBatch(batch, future, planned.in_step))
            put(None)
        except BaseException as error:
            # The training thread raises it.
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="batches")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    thread.start()
    try:
        while (result := results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()
        thread.join(timeout=JOIN_SECONDS)
        sys.setswitchinterval(interval)
