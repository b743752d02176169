"""Requests for rewards in flight, to this process or to the Ray service."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

# Measurements that the percentiles look back on.
WINDOW = 10_000


class RewardSource(Protocol):
    """Token rewards from this process, the Ray actors or the disk (METHOD.md §5)."""

    meter: LatencyMeter

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> RewardFuture:
        """Begin to fetch the rewards of T targets: users, positions int64 [T]."""
        ...


class LatencyMeter:
    """What a client measures of its answers.

    How many were ready when one was taken, how long each took, how long the taker
    waited.
    """

    def __init__(self) -> None:
        self.in_flight: deque[RewardFuture] = deque()
        # How many answers were ready when one was taken.
        self.ready: deque[int] = deque(maxlen=WINDOW)
        # Seconds from the request until the answer was taken, or was ready if the taker waited.
        self.latency: deque[float] = deque(maxlen=WINDOW)
        self.wait: deque[float] = deque(maxlen=WINDOW)
        self.answers = self.retries = 0
        # Answers that were read from disk.
        self.cached = 0
        self.wait_seconds = 0.0

    def summary(self) -> dict[str, float]:
        """The measurements, in seconds; an answer is one micro-batch's rewards.

        answers, retries, cached (answers from disk), queue_depth (mean ready),
        latency_p50/p95/p99, wait_mean, wait_p99 and wait_seconds (total). Zeros before
        the first answer.
        """
        latency, wait = np.array(self.latency or [0.0]), np.array(self.wait or [0.0])
        return {
            "answers": self.answers,
            "retries": self.retries,
            "cached": self.cached,
            "queue_depth": float(np.mean(self.ready or [0])),
            **{f"latency_p{q}": float(np.percentile(latency, q)) for q in (50, 95, 99)},
            "wait_mean": float(wait.mean()),
            "wait_p99": float(np.percentile(wait, 99)),
            "wait_seconds": self.wait_seconds,
        }


class RewardFuture:
    """A request in flight on a thread of this process.

    The thread computes rewards, reads them, or waits for the actors.
    """

    def __init__(
        self, meter: LatencyMeter, pool: ThreadPoolExecutor, compute: Callable[[], np.ndarray]
    ) -> None:
        self.meter, self.requested_at = meter, time.perf_counter()
        # Called with the rewards when they are taken.
        self.on_taken: Callable[[np.ndarray], None] | None = None
        self._future = pool.submit(compute)
        # Last: from here on the thread that takes answers sees this one.
        meter.in_flight.append(self)

    def ready(self) -> bool:
        """Whether `result` would return at once."""
        return self._future.done()

    def result(self) -> np.ndarray:
        """Wait for the rewards, float32 [nnz]; to be called once."""
        meter, started = self.meter, time.perf_counter()
        meter.ready.append(sum(future.ready() for future in list(meter.in_flight)))
        rewards = self._future.result()
        meter.in_flight.remove(self)
        taken = time.perf_counter()
        meter.answers += 1
        meter.latency.append(taken - self.requested_at)
        meter.wait.append(taken - started)
        meter.wait_seconds += taken - started
        if self.on_taken is not None:
            self.on_taken(rewards)
        return rewards
