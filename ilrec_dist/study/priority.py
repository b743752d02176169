"""Leaves the machine to other work."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

NICENESS = 19
# Linux first divides the processor between sessions, by a niceness of each, where
# this file is there; that of a process counts within its session alone (sched(7)).
SESSION_NICENESS = Path("/proc/self/autogroup")


def lower_priority() -> None:
    """Give this process, and the session that it is in, the lowest priority."""
    os.nice(NICENESS)
    _lower_session()


def keep_priority() -> None:
    """Called by a new process in a session of its own: the session gets the lowest
    priority too if the process was given it.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) == NICENESS:
        _lower_session()


def _lower_session() -> None:
    # Where the kernel does not know it, or forbids it, niceness alone must do.
    with suppress(OSError):
        SESSION_NICENESS.write_text(str(NICENESS))
