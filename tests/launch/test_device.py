"""What a worker takes of its node."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from ilrec_dist.config.tree import Config
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.pipeline import worker_tasks


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("threads", "expected"), [(None, 2), (3, 3)])
def test_the_workers_of_a_node_share_its_cores(monkeypatch, device, threads, expected):
    # A node of nine cores, with four of sixteen workers, and Ray's one thread for each.
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(9)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # There need be no GPU for this, nor other workers.
    parallel = SimpleNamespace(tp=1)
    monkeypatch.setattr(worker_tasks, "initialize_parallel", lambda *_, **__: parallel)
    monkeypatch.setattr(worker_tasks, "check_placement", lambda *_: None)
    launch = LaunchConfig(workers=16, device=device, threads=threads)
    try:
        with worker_tasks.worker_session(Config(launch=launch)):
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
