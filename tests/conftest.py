"""Session-wide settings of the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ilrec_dist.testing.distributed import close_pools


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each file's tests in one worker, because they share fixtures.

    Files in a group of their own marking, such as those that start a Ray cluster, share a worker.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))


@pytest.fixture(scope="session", autouse=True)
def _end_processes() -> Iterator[None]:
    """End the processes that run_distributed keeps for the session."""
    yield
    close_pools()
