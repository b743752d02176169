"""The micro-batches of an optimizer step, as many on every data-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.samples.prefetch import BatchSource, PrefetchedBatch
from ilrec_dist.training.config import TrainConfig


class StepBatches:
    """Takes the micro-batches of the next step from `batches`; collective over dp.

    count: how many `next` gives. divisor: what
    the engine divides the sum of their losses by.
    """

    def __init__(
        self,
        batches: Iterator[PrefetchedBatch],
        maker: BatchSource,
        config: TrainConfig,
        parallel: ParallelState,
    ) -> None:
        self.batches, self.maker = batches, maker
        self.by_tokens = config.micro_batch_tokens is not None
        self.first = next(batches)
        self.count, self.taken = self.first.in_step, 0
        self.divisor = 1 if self.by_tokens else self.count
        if self.by_tokens and parallel.dp > 1:
            most = torch.tensor(self.count, device=parallel.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=parallel.dp_group)
            self.count = int(most)

    def next(self, engine: Any) -> PrefetchedBatch:
        """The next micro-batch, after the engine was told whether it is the last one.

        It is empty where another rank has more of them.
        """
        self.taken += 1
        if self.by_tokens:
            engine.set_gradient_accumulation_boundary(self.taken == self.count)
        if self.taken == 1:
            return self.first
        if self.taken <= self.first.in_step:
            return next(self.batches)
        nothing = np.zeros(0, np.int64)
        return PrefetchedBatch(self.maker.make(nothing, self.first.batch.step_rows), None)
