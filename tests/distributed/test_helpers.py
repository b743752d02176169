"""The distributed helper: groups, results in rank order, failures that name
the rank.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

import ilrec_dist.testing.distributed as distributed
from ilrec_dist.distributed.process_groups import initialize_parallel
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


def return_late(mesh: Mesh, folder: Path) -> float:
    """When this rank returns. When it ends its groups is in a file."""
    end_groups = distributed._end_groups

    def note_and_end() -> None:
        distributed._end_groups = end_groups
        (folder / str(mesh.rank)).write_text(str(time.monotonic()))
        end_groups()

    distributed._end_groups = note_and_end
    time.sleep(0.2 * mesh.rank)
    return time.monotonic()


def make_groups(mesh: Mesh) -> tuple[float, float]:
    """When this rank has its groups, the last one late, and when it goes on."""
    made = 0.0
    make = parallel_state.initialize_model_parallel

    def make_late(**arguments: Any) -> None:
        nonlocal made
        make(**arguments)
        time.sleep(0.2 * mesh.rank)
        made = time.monotonic()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parallel_state, "initialize_model_parallel", make_late)
        initialize_parallel(mesh.tp)
    return made, time.monotonic()


def test_groups_stay_until_every_rank_has_returned(tmp_path: Path):
    returned = run_distributed(return_late, 2, 1, tmp_path)
    ended = [float((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert max(returned) <= min(ended)


def test_no_rank_goes_on_before_all_have_their_groups():
    made, went_on = zip(*run_distributed(make_groups, 2, 2), strict=True)
    assert max(made) <= min(went_on)


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
