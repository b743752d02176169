"""Where a process stands among all. Loads no more than torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ilrec_dist.common.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelState:
    """Where this process stands in the layout.

    Tensor-parallel ranks are neighbours: rank = dp_rank · tp + tp_rank. All ranks of
    one tensor-parallel group must be fed the same rows: shard data by `dp_rank` of
    `dp`, never by world rank.
    """

    tp: int
    dp: int
    tp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    device: torch.device


def is_rank0() -> bool:
    return dist.get_rank() == 0


def from_rank0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def over_data_parallel(parallel: ParallelState, make: Callable[[], list[T]]) -> list[T]:
    """What `make` gives on each data-parallel rank, joined in their order; the same on
    every rank, and so is a UserError that one of them meets.
    """
    if parallel.dp == 1:
        return make()
    # A rank that meets an error leaves no other waiting for it.
    with refused_together(parallel.dp_group):
        local = make()
    gathered: list[list[T]] = [[] for _ in range(parallel.dp)]
    dist.all_gather_object(gathered, local, group=parallel.dp_group)
    return [value for rank in gathered for value in rank]


@contextmanager
def refused_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raise the UserError that one rank of the group meets in the block in all of them.

    Collective over the group, None being all ranks: no rank leaves the block
    before all are at its end, and so none waits for one that was refused.
    """
    refusal = None
    try:
        yield
    except UserError as error:
        refusal = str(error)
    refusals: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(refusals, refusal, group=group)
    for line in refusals:
        if line is not None:
            raise UserError(line)
