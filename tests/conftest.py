"""Session-wide settings of the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ilrec_dist.testing.distributed import close_pools


@pytest.fixture(scope="session", autouse=True)
def _end_processes() -> Iterator[None]:
    """End the processes that run_distributed keeps for the session."""
    yield
    close_pools()
