"""Commands that a signal ends."""

from __future__ import annotations

import signal

import psutil

PATIENCE_SECONDS = 30


def default_signals() -> None:
    """Undo the ignored SIGINT that a shell gives to its background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def require_ended(
    children: list[psutil.Process], errors: str, word: str, may_trace: bool = False
) -> None:
    """The command ended with its one line, and none of its processes is left."""
    line = f"ilrec: {word}; the same command goes on where it stopped"
    assert errors.strip().splitlines()[-1] == line
    for trace in () if may_trace else ("Fatal Python error", "SIGABRT", "Stack trace", "*** "):
        assert trace not in errors
    _, alive = psutil.wait_procs(children, timeout=PATIENCE_SECONDS)
    assert not [child for child in alive if "ilrec" in " ".join(child.cmdline())]
