"""Session-wide settings of the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from ilrec_dist.testing.distributed import close_pools

# A busy machine makes single examples slow.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

@pytest.fixture(scope="session", autouse=True)
def _one_thread_a_process() -> Iterator[None]:
    """Compute with one thread, here and in processes started from here.

    OpenMP's threads wait for each other by spinning, which takes several times as long where
    other processes use the cores too. At the end the processes that run_distributed keeps end.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    yield
    close_pools()
