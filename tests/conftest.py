"""Session-wide settings of the tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from ilrec_dist.testing.distributed import close_pools
from tests.support.commands import Commands, ended_commands
from tests.support.warm_ray import warm_workers, worker_server
from tests.support.warm_torchrun import run_torchrun, run_warm, torchrun_is

# Of the seconds that importing everything takes, looking for garbage would be one fifth.
gc.disable()

# Megatron marks functions for torch.compile, which nothing here calls: of each process's imports
# this leaves out a third.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# Ray need not start processes before anybody asks for one.
os.environ.setdefault("RAY_enable_worker_prestart", "0")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Its workers, on which tests wait, get as much of the cores as the other tests.
os.environ.setdefault("RAY_worker_niceness", "0")

# A busy machine makes single examples slow.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Folders whose tests share what is made once a session, or should not run beside each other: each
# is the work of one process. Of the other folders each file is. The longest are begun first.
TOGETHER = {folder: folder for folder in ("faults", "launch", "cli", "training", "kernels", "cf")}
LONGEST = ("faults", "launch", "study", "training", "kernels", "cli")


def group_of(nodeid: str) -> str:
    """The group of tests that one process of
    pytest-xdist runs: a folder's, or a file's.
    """
    path = nodeid.partition("::")[0].removeprefix("tests/")
    return TOGETHER.get(path.partition("/")[0], path)


class GroupScheduling(LoadScopeScheduling):
    """Gives each process whole groups."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> GroupScheduling:
    """Called by pytest-xdist where tests run in several processes."""
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest groups, so that
    no process waits for another at the end.
    """

    def place(item: pytest.Item) -> int:
        group = group_of(item.nodeid).partition("/")[0]
        return LONGEST.index(group) if group in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Look for garbage again, but not in what has been imported, which stays."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread_a_process() -> Iterator[None]:
    """Compute with one thread, here and in processes started from here.

    OpenMP's threads wait for each other by spinning, which takes
    several times as long where other processes use the cores
    too. At the end the processes that run_distributed keeps end.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    yield
    close_pools()


@pytest.fixture(scope="session", autouse=True)
def _warm_workers() -> Iterator[None]:
    """Jobs run in worker groups that are there already."""
    with torchrun_is(run_warm):
        yield


@pytest.fixture(scope="session")
def _worker_server() -> Iterator[str]:
    with worker_server() as path:
        yield path


@pytest.fixture(scope="module")
def warm_ray(_worker_server: str) -> Iterator[None]:
    """The workers of Ray nodes that a module starts have imported all already."""
    with warm_workers(_worker_server):
        yield


@pytest.fixture
def commands() -> Iterator[Commands]:
    """Starts commands, which end with the test."""
    with ended_commands() as started:
        yield started


@pytest.fixture(scope="module")
def started_workers() -> Iterator[None]:
    """Jobs run in workers that torchrun starts for each, as outside the tests."""
    with torchrun_is(run_torchrun):
        yield
