"""What the workers of the launcher's tests run."""

from __future__ import annotations

import errno
import os
import time
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


def run_on(folder: str) -> None:
    """Note that this worker is there, and go on until it is ended."""
    with open(Path(folder) / f"worker-{os.environ['RANK']}", "a") as file:
        file.write("x")
    while True:
        time.sleep(0.1)
