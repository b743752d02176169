"""The distributed helper: groups, results in rank order, failures that name
the rank.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from ilrec_dist.testing.distributed import Mesh, run_distributed

pytestmark = pytest.mark.slow


def ranks_and_sums(mesh: Mesh, value: torch.Tensor) -> tuple[int, int, int, float, float, int]:
    tp_sum, dp_sum = value + mesh.rank, value + mesh.rank
    dist.all_reduce(tp_sum, group=mesh.tp_group)
    dist.all_reduce(dp_sum, group=mesh.dp_group)
    return mesh.rank, mesh.tp_rank, mesh.dp_rank, tp_sum.item(), dp_sum.item(), os.getpid()


def fail_on_one(mesh: Mesh) -> None:
    if mesh.rank == 1:
        raise ValueError("deliberate")
    dist.barrier()


def test_groups_and_reuse():
    first = run_distributed(ranks_and_sums, 4, 2, torch.tensor(0.0))
    assert [r[:5] for r in first] == [
        (0, 0, 0, 1.0, 2.0),
        (1, 1, 0, 1.0, 4.0),
        (2, 0, 1, 5.0, 2.0),
        (3, 1, 1, 5.0, 4.0),
    ]
    again = run_distributed(ranks_and_sums, 4, 4, torch.tensor(1.0))
    assert [r[5] for r in again] == [r[5] for r in first]
    assert {r[3] for r in again} == {10.0}


def test_failure_names_the_rank_and_the_next_call_works():
    with pytest.raises(RuntimeError, match="(?s)rank 1 failed.*deliberate"):
        run_distributed(fail_on_one, 2, 1)
    assert [r[0] for r in run_distributed(ranks_and_sums, 2, 2, torch.tensor(0.0))] == [0, 1]
