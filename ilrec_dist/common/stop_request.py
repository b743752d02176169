"""How a command asks its workers, who may be on other machines, to save and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# In the folder: that the workers listen, and that they are asked.
LISTENING, ASKED = ".stop.listening", ".stop.asked"
POLL_SECONDS = 0.2
# How long who listens may take to save what there is; schedulers warn 120 s before they kill.
SAVE_SECONDS = 75.0
# Set once SIGTERM has come to this command. Libraries turn the exception that its handler raises
# into one of their own, so the exception cannot say it.
TERMINATED = threading.Event()


class StopRequest:
    """A request to whoever listens below `folder`, which both sides see."""

    def __init__(self, folder: Path) -> None:
        self._listening, self._asked = folder / LISTENING, folder / ASKED

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block `asked` is looked at; one worker of the group says so."""
        self._listening.touch()
        try:
            yield
        finally:
            self._listening.unlink(missing_ok=True)

    @property
    def asked(self) -> bool:
        return self._asked.exists()

    def clear(self) -> None:
        """Forget what earlier commands left, before any worker is started."""
        for path in (self._listening, self._asked):
            path.unlink(missing_ok=True)

    def ask_if_terminated(self) -> None:
        """After SIGTERM, ask where somebody listens, and wait until nobody does."""
        if not (TERMINATED.is_set() and self._listening.exists()):
            return
        self._asked.touch()
        until = time.monotonic() + SAVE_SECONDS
        while self._listening.exists() and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
