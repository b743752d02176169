"""Session-wide settings of the tests, and which of them stay in one process.

pytest-xdist runs the suite in two processes. A group of tests runs in one of them, in order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from ilrec_dist.testing.distributed import close_pools

# Folders whose files share fixtures of the session.
SHARED_FIXTURES = ("tests/cf", "tests/training")
# Files that start Ray or signal whole process trees: one at a time on a small machine.
CLUSTER = (
    "tests/cf/test_nodes.py",
    "tests/cf/test_service.py",
    "tests/data/test_cluster.py",
    "tests/faults",
    "tests/launch",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put each test into the group of its file, its folder, or the cluster; long ones first."""
    order: dict[str, tuple[int, int]] = {}
    for number, item in enumerate(items):
        path = item.nodeid.partition("::")[0]
        group = path
        if path.startswith(CLUSTER):
            group = "cluster"
        elif path.startswith(SHARED_FIXTURES):
            group = path.rpartition("/")[0]
        item.add_marker(pytest.mark.xdist_group(group))
        slow = item.get_closest_marker("slow") is not None
        rank = 0 if group == "cluster" else 1 if slow else 2
        first = order.get(group, (rank, number))
        order[group] = (min(rank, first[0]), first[1])
    groups = {item: item.get_closest_marker("xdist_group").args[0] for item in items}
    items.sort(key=lambda item: order[groups[item]])


@pytest.fixture(scope="session", autouse=True)
def _one_thread_a_process() -> Iterator[None]:
    """Compute with one thread, here and in processes started from here.

    OpenMP's threads wait for each other by spinning, so that tests in two processes on two cores
    would take several times as long. At the end the processes that run_distributed keeps end.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    yield
    close_pools()
