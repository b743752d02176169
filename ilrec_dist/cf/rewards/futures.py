"""Answers under way: the same handle and the same measurements for rewards computed in this process and by the Ray service."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

KEPT = 10_000  # measurements the percentiles look back on


class Meter:
    """What a client sees of its answers: how many stood ready when one was taken, how long each took, how long the taker waited."""

    def __init__(self) -> None:
        self.under_way: deque[RewardFuture] = deque()
        self.ready: deque[int] = deque(maxlen=KEPT)
        self.latency: deque[float] = deque(
            maxlen=KEPT
        )  # seconds from asking to taking, or to being ready if the taker had to wait
        self.wait: deque[float] = deque(maxlen=KEPT)
        self.answers = self.retries = 0
        self.cached = 0  # answers from disk
        self.wait_seconds = 0.0

    def summary(self) -> dict[str, float]:
        """answers, retries, cached (answers from disk), queue_depth (mean ready), latency_p50/p95/p99, wait_mean, wait_p99 and wait_seconds (total).

        An answer is one micro-batch's; seconds. Zeros before the first answer.
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
    """A request under way on a thread of this process: one that computes rewards, reads them, or waits for the actors."""

    def __init__(
        self, meter: Meter, pool: ThreadPoolExecutor, compute: Callable[[], np.ndarray]
    ) -> None:
        self.meter, self.asked = meter, time.perf_counter()
        self.keep: Callable[[np.ndarray], None] | None = (
            None  # called with the rewards when they are taken
        )
        self._future = pool.submit(compute)
        meter.under_way.append(
            self
        )  # last: from here on the thread that takes answers sees this one

    def ready(self) -> bool:
        """Whether `result` would return at once."""
        return self._future.done()

    def result(self) -> np.ndarray:
        """The rewards, float32 [nnz]; waits for them. To be taken once."""
        meter, started = self.meter, time.perf_counter()
        meter.ready.append(sum(pending.ready() for pending in list(meter.under_way)))
        rewards = self._future.result()
        meter.under_way.remove(self)
        taken = time.perf_counter()
        meter.answers += 1
        meter.latency.append(taken - self.asked)
        meter.wait.append(taken - started)
        meter.wait_seconds += taken - started
        if self.keep is not None:
            self.keep(rewards)
        return rewards
