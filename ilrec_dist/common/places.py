"""Places on a cluster, for code that knows no launcher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

# How often `Places.check` is called while a task is waited for.
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Places:
    """Where tasks of a Ray cluster run: `count` at once, each on one unit of
    `resource`, under Ray's scheduling strategy.
    """

    resource: str
    count: int
    strategy: Any
    # Raises WorkersFailed where all places have been lost for too long: Ray itself lets
    # their tasks wait for ever.
    check: Callable[[], None]

    @property
    def options(self) -> dict[str, Any]:
        """Ray's options of a task that takes one of them."""
        units = {"num_cpus": int(self.resource == "CPU"), "num_gpus": int(self.resource == "GPU")}
        return {**units, "scheduling_strategy": self.strategy}


# Takes at most so many, or all with None, for the length of a block. Raises WorkersFailed where
# there are none in time.
TakePlaces = Callable[[int | None], AbstractContextManager[Places]]
