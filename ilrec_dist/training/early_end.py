"""When the ranks look together whether the command asks them to save and end."""

from __future__ import annotations

import time

from ilrec_dist.common.stop_request import StopRequest
from ilrec_dist.distributed.layout import from_rank0, is_rank0

# Of a step. After slower ones the ranks look at each, as the command does not wait for ten of them.
SLOW_SECONDS = 1.0


class EarlyEnd:
    """Whether a training must end early, the same on every rank.

    The ranks look where they log, and where steps are slow after every step.
    """

    def __init__(self, stop: StopRequest | None) -> None:
        self._stop, self._steps_are_slow = stop, True
        # Steps since the ranks looked, and when that was.
        self._steps, self._since = 0, time.monotonic()

    def is_due(self, is_logged: bool) -> bool:
        """Called after every step; a collective."""
        self._steps += 1
        if self._stop is None or not (is_logged or self._steps_are_slow):
            return False
        now = time.monotonic()
        are_slow = now - self._since > SLOW_SECONDS * self._steps
        answer = from_rank0((is_rank0() and self._stop.asked, are_slow))
        is_asked, self._steps_are_slow = answer
        self._steps, self._since = 0, now
        return bool(is_asked)
