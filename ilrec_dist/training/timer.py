"""Wall time of the parts of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimer:
    """Seconds of each part of the steps since the last report, without pauses."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._paused = 0.0
        self._start = time.monotonic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's time to this part."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the block's time (a validation, a checkpoint) out of the rates."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def report(self, tokens: float, rows: float) -> dict[str, float]:
        """tokens/s, rows/s, and the seconds of all steps and of each part;
        starts anew.
        """
        elapsed = time.monotonic() - self._start - self._paused
        report = {
            "rate/tokens_per_second": tokens / elapsed,
            "rate/rows_per_second": rows / elapsed,
            "time/all": elapsed,
        }
        report |= {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        self._paused = 0.0
        self._start = time.monotonic()
        return report
