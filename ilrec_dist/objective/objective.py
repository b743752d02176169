"""What the Trainer knows of an objective: a
module that gives a loss and its statistics.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn

from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.model.gpt import Backbone


class ObjectiveOutput(Protocol):
    """The loss of a micro-batch, differentiable, and what happened in it, detached."""

    @property
    def loss(self) -> torch.Tensor: ...

    @property
    def rows(self) -> Any: ...


class Statistics(Protocol):
    """Sums of an objective's statistics since the last report."""

    def add(self, rows: Any, num_tokens: int, grid_index: torch.Tensor | None = None) -> None:
        """Add the `rows` of an output, and the
        batch's input tokens and grid of positions.
        """
        ...

    def is_finite(self, group: dist.ProcessGroup | None) -> bool:
        """Whether no sum is NaN or infinite on any rank; collective over the group."""
        ...

    def report(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        """The means over all data-parallel ranks since the last report; starts anew.

        Among them are `tokens`, `rows`, `loss/total` and a
        `loss/NAME` for each loss term. Collective over the group.
        """
        ...


class Objective(nn.Module):
    """The backbone and a loss as one module, so that the engine wraps a single forward.

    A subclass's `forward(*inputs, rewards, loss_scale)` takes what its batches call
    model inputs, and returns an ObjectiveOutput whose loss is the sum over the
    micro-batch times loss_scale. `rewards`, float32 [nnz], is None where
    `needs_rewards` is False.
    """

    needs_rewards = False
    # The streams of hidden rows that go through the output head.
    streams = 1
    # The loss terms, by the names under which the statistics report them.
    terms: tuple[str, ...]

    def __init__(
        self,
        backbone: Backbone,
        softmax_scope: Literal["all", "valid_next"],
        parallel: ParallelState,
    ) -> None:
        super().__init__()
        self.backbone, self.softmax_scope, self.parallel = backbone, softmax_scope, parallel

    def begin_step(self, step: int, total_steps: int) -> None:
        """Called before each optimizer step, from 0, of those of the whole training."""

    def make_statistics(self, depth: int) -> Statistics:
        """Empty sums for items of up to `depth` tokens."""
        raise NotImplementedError
