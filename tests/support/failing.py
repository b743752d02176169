"""What the workers of the launcher's tests run."""

from __future__ import annotations

import errno
from pathlib import Path

from ilrec_dist.common.errors import UserError


def count(folder: str) -> int:
    """Count this attempt; returns how many there were."""
    attempts = Path(folder) / "attempts"
    made = len(attempts.read_text()) + 1 if attempts.exists() else 1
    attempts.write_text("x" * made)
    return made


def fail_alike(folder: str) -> None:
    count(folder)
    raise ValueError("the same as ever")


def fail_otherwise(folder: str) -> None:
    raise ValueError(f"attempt {count(folder)}")


def lose_a_peer(folder: str) -> None:
    count(folder)
    raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")


def refuse(folder: str) -> None:
    count(folder)
    raise UserError("data.csv: row 3")


def fill_disk(folder: str) -> None:
    count(folder)
    raise OSError(errno.ENOSPC, "No space left on device", "/run/best.safetensors")


def note_environment(folder: str) -> None:
    """The variables that this worker was started with."""
    started_with = Path("/proc/self/environ").read_text().split("\0")
    (Path(folder) / "environment").write_text("\n".join(started_with))
