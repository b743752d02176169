"""How far the work of a process is, in a file that other processes read."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Count:
    """How far some work is."""

    title: str
    done: float
    total: float
    note: str = ""

    @property
    def is_finished(self) -> bool:
        return self.done >= self.total


def write_counter(path: Path, count: Count) -> None:
    """Write how far this process is, for another one to show by `follow_counter`.

    The folder is made when absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(count)))


def read_counter(path: Path) -> tuple[Count, float] | None:
    """The latest count that `write_counter` left, with what all files of its title say
    is done, and when it was written (Unix seconds); None where there is none.
    """
    counts = [(when, count) for _, count, when in _written(path)]
    if not counts:
        return None
    when, latest = max(counts, key=lambda entry: entry[0])
    return _together(latest, (count for _, count in counts)), when


def latest_counts(path: Path, stop: threading.Event, poll_seconds: float) -> Iterator[Count]:
    """The latest count, with what all files say is done, whenever
    another count is written, until `stop` is set.
    """
    known: dict[Path, Count] = {}
    while True:
        latest = None
        for file, count, _ in _written(path):
            if count != known.get(file):
                latest = known[file] = count
        if latest is not None:
            yield _together(latest, known.values())
        if stop.wait(poll_seconds):
            return


def _written(path: Path) -> Iterator[tuple[Path, Count, float]]:
    """The files whose names begin with that of `path`, what each
    counts, and when it was written (Unix seconds).
    """
    for file in path.parent.glob(f"{path.name}*"):
        try:
            count, when = Count(**json.loads(file.read_text())), file.stat().st_mtime
        except (FileNotFoundError, ValueError, TypeError):
            # It exists no longer, or is half written.
            continue
        yield file, count, when


def _together(latest: Count, counts: Iterable[Count]) -> Count:
    """The latest count, with what all of its title say is done."""
    return replace(latest, done=sum(count.done for count in counts if count.title == latest.title))
