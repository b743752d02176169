"""What a run's folder says of its workers: who
they are, and when and why they began again.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object, write_json

# The folder of a job, below the job's own, with a line for each attempt and a file for each worker.
ATTEMPTS, LINES = ".attempts", "attempts.jsonl"
LOST = "a worker was lost without a word: killed, or with its node"


@dataclass(frozen=True)
class Attempt:
    """One start of the worker group."""

    # Unix seconds.
    time: float
    workers: int
    # Whether it is the launcher's restart of a group that failed, and not a new command.
    is_restart: bool
    # Why the group before it ended; "" where nothing failed.
    reason: str


def begin_attempt(folder: Path, failures: Path) -> None:
    """Note this worker, and in rank 0 the attempt.
    `failures` has what the ranks met before.

    The driver empties `failures` when a command begins, and leaves its mark there.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    worker = {
        "host": socket.gethostname(),
        "node": os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")),
        "process": os.getpid(),
    }
    (folder / ATTEMPTS).mkdir(exist_ok=True)
    write_json(folder / ATTEMPTS / f"rank-{rank}.json", worker)
    if rank != 0:
        return
    begun = failures / "begun"
    is_restart = begun.exists()
    before = read_attempts(folder)
    notes = _notes(failures)
    reason = _reason(failures, notes, _notes_before(begun)) if is_restart and before else ""
    failures.mkdir(exist_ok=True)
    write_json(begun, notes)
    attempt = Attempt(round(time.time(), 3), world_size, is_restart, reason)
    with open(folder / ATTEMPTS / LINES, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")


# A rank's note: its file and when that was written. Each is a new file; times alone do not tell
# them apart, since file systems count in milliseconds.
Notes = dict[str, list[int]]


def _notes(failures: Path) -> Notes:
    paths = sorted(failures.glob("rank-*.json"))
    return {path.name: _written(path) for path in paths}


def _written(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_mtime_ns]


def _notes_before(begun: Path) -> Notes:
    """Those that were there when the last attempt began."""
    try:
        return dict(read_json_object(begun))
    except UserError:
        return {}


def _reason(failures: Path, notes: Notes, before: Notes) -> str:
    """What the ranks noted since then, if it
    does not merely say that another one is gone.
    """
    new = [name for name, note in notes.items() if note != before.get(name)]
    said = [read_json_object(failures / name) for name in new]
    messages = [note["error"] for note in said if not note.get("of_another_rank")]
    return messages[0] if messages else LOST


def read_attempts(folder: Path) -> list[Attempt]:
    """The attempts in the order of their starts; [] where there was none."""
    path = folder / ATTEMPTS / LINES
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    attempts = []
    for line in lines:
        try:
            entry = json.loads(line)
            attempt = Attempt(
                float(entry["time"]),
                int(entry["workers"]),
                bool(entry["is_restart"]),
                str(entry["reason"]),
            )
        except (ValueError, TypeError, KeyError):
            # A killed worker tore the line, or it was damaged.
            continue
        attempts.append(attempt)
    return attempts


def read_workers(folder: Path, count: int) -> list[dict[str, Any]]:
    """The workers of the last attempt by rank, as far as they
    have begun, and what they noted is whole.
    """
    workers = []
    for rank in range(count):
        with suppress(UserError):
            worker = read_json_object(folder / ATTEMPTS / f"rank-{rank}.json")
            if {"host", "node", "process"} <= worker.keys():
                workers.append(worker)
    return workers
