"""Rewards ahead of the step: one interface over the in-process scorer and the Ray service, and a bounded queue of answers under way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from ilrec_dist.cf.rewards import TokenRewards

Request = TypeVar("Request")


class Pending(Protocol):
    """An answer under way."""

    def result(self) -> np.ndarray:
        """The rewards, float32 [nnz]; waits for them."""
        ...

    def ready(self) -> bool:
        """Whether `result` would return at once."""
        ...


class Client(Protocol):
    """What a trainer needs of either kind of rewards."""

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> Pending:
        """Begin `TokenRewards.fetch` of these targets, int [T] each, and return at once."""
        ...


class _Local:
    def __init__(self, compute: Callable[[], np.ndarray], pool: ThreadPoolExecutor) -> None:
        self._future = pool.submit(compute)

    def result(self) -> np.ndarray:
        return self._future.result()

    def ready(self) -> bool:
        return self._future.done()


class LocalClient:
    """Rewards from this process, computed one request at a time on a thread of their own, so that they overlap the training step."""

    def __init__(self, rewards: TokenRewards) -> None:
        self.rewards = rewards
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="token-rewards")

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> Pending:
        return _Local(lambda: self.rewards.fetch(users, positions), self._pool)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass
class QueueMetrics:
    """What the queue saw, one entry a step: answers ready when the step asked, seconds the step waited."""

    ready: list[int] = field(default_factory=list)
    wait_seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Mean queue depth, total, mean and 99th-percentile wait; zeros before the first step."""
        wait = np.array(self.wait_seconds or [0.0])
        return {
            "queue_depth": float(np.mean(self.ready or [0])),
            "wait_seconds": float(wait.sum()),
            "wait_seconds_per_step": float(wait.mean()),
            "wait_seconds_p99": float(np.percentile(wait, 99)),
        }


class Ahead(Generic[Request]):
    """Iterates over requests with their rewards, keeping up to `depth` later ones under way.

    `targets_of(request)` gives the (users, positions) to fetch. The order is that of the requests, whatever the order of the answers.
    """

    def __init__(self, client: Client, requests: Iterable[Request], targets_of: Callable[[Request], tuple[np.ndarray, np.ndarray]], depth: int = 4) -> None:
        if depth < 1:
            raise ValueError(f"a queue of depth {depth}: expected at least 1")
        self.client, self.requests, self.targets_of, self.depth = client, requests, targets_of, depth
        self.metrics = QueueMetrics()

    def __iter__(self) -> Iterator[tuple[Request, np.ndarray]]:
        queue: deque[tuple[Request, Pending]] = deque()
        source = iter(self.requests)
        while True:
            while len(queue) <= self.depth:
                request = next(source, _END)
                if request is _END:
                    break
                queue.append((request, self.client.fetch_async(*self.targets_of(request))))  # type: ignore[arg-type]
            if not queue:
                return
            request, pending = queue.popleft()
            self.metrics.ready.append(int(pending.ready()) + sum(later.ready() for _, later in queue))
            started = time.perf_counter()
            rewards = pending.result()
            self.metrics.wait_seconds.append(time.perf_counter() - started)
            yield request, rewards


_END = object()
