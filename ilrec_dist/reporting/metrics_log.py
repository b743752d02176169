"""A run's metrics as they happen: JSON lines in metrics.jsonl, and scalars for
TensorBoard.

Look at a run with `tensorboard --logdir runs`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import atomic_file
from ilrec_dist.reporting.trackers import TrackerName, close_within, open_tracker

METRICS_FILE = "metrics.jsonl"
# The key of a training's result.json that has the SHA-256 of its complete log.
METRICS_SHA256 = "metrics_sha256"
TENSORBOARD_FOLDER = "tensorboard"
# Written on resume: the number of logged steps that the checkpoint did not cover.
RESUMED = "resumed/dropped_steps"
# The keys of a validation begin with it.
VALIDATION = "validation/"

Nested: TypeAlias = "Mapping[str, float | Nested]"


class MetricsLog:
    """Append-only metrics of one training run, written by rank 0 alone (names:
    METHOD.md §6).

    `folder` is made when absent. With `resume_step` k, lines of steps after k and of a
    validation at k are dropped first, so that what comes again is there once, and a
    line gives the number of dropped steps. Without it lines are added to what is there.
    A last line that a killed writer left torn is removed either way. Every line is
    flushed, so a SIGKILL costs at most the line being written. A `tracker` gets the
    values as well; what it meets after its beginning ends no training.
    """

    def __init__(
        self,
        folder: str | Path,
        resume_step: int | None = None,
        tracker: TrackerName | None = None,
    ) -> None:
        # The import takes two seconds, which readers of a log should not pay.
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        last_step = _mend(self.folder / METRICS_FILE, resume_step)
        self._file = open(self.folder / METRICS_FILE, "a", encoding="utf-8")
        purge = None if resume_step is None else resume_step + 1
        self._tensorboard = SummaryWriter(
            str(self.folder / TENSORBOARD_FOLDER), purge_step=purge, flush_secs=10
        )
        self._tracker = None if tracker is None else open_tracker(tracker, self.folder)
        if resume_step is not None and last_step is not None:
            self._append(
                {"step": resume_step, "time": _now(), RESUMED: max(0, last_step - resume_step)}
            )

    def write(self, step: int, epoch: float, values: Nested) -> None:
        """Write one line: {"step", "epoch", "time" (Unix seconds), …}.

        Nested mappings become `outer/inner` keys; values are anything float() takes. A
        value that is not finite is written as null, because JSON has no word for it.
        """
        line: dict[str, float | int | None] = {"step": int(step), "epoch": epoch, "time": _now()}
        finite = {}
        for key, value in flatten(values):
            line[key] = None
            if math.isfinite(value):
                line[key] = finite[key] = value
            self._tensorboard.add_scalar(key, value, int(step))
        self._append(line)
        if self._tracker is not None:
            with self._tracked():
                self._tracker.write(int(step), {"epoch": epoch, **finite})

    def close(self, finished: bool = True) -> None:
        """finished: whether the training is at its end, and is not to go on later."""
        self._file.close()
        self._tensorboard.close()
        if self._tracker is not None:
            with self._tracked():
                close_within(self._tracker, finished)
            self._tracker = None

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        """Go on without the tracker after it has failed."""
        try:
            yield
        except Exception as error:
            self._tracker = None
            words = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: train.tracker: {words}; it gets nothing more", flush=True)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n")
        self._file.flush()


def flatten(values: Nested, prefix: str = "") -> Iterator[tuple[str, float]]:
    """{"loss": {"cpo": 1}} → ("loss/cpo", 1.0), …, in the order given."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, float(value)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of folder/metrics.jsonl in order, without a torn last line; [] without
    a file.

    Raises UserError naming file and line when an
    earlier line is not a JSON object with a step.
    """
    path = Path(folder) / METRICS_FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    return [line for line, _ in _whole_lines(text, path)]


def _whole_lines(text: bytes, path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    lines = text.split(b"\n")
    # What follows the last newline is empty or torn.
    torn = len(lines) - 1
    for number, raw in enumerate(lines[:torn], start=1):
        line = parse_line(raw)
        if line is not None:
            yield line, raw
        elif number < torn:
            raise UserError(
                f"{path}: line {number} is not a JSON object with a step; delete that line to go on"
            )


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl, or None when it is not a JSON object with an integer
    step.
    """
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _mend(path: Path, resume_step: int | None) -> int | None:
    """Drop a torn last line and, on resume, the lines after `resume_step` and of its
    validation.

    Returns the last step that was logged before, None where there is no log.
    """
    if not path.exists():
        return None
    text = path.read_bytes()
    lines = list(_whole_lines(text, path))
    kept = b"".join(raw + b"\n" for line, raw in lines if not _comes_again(line, resume_step))
    if kept != text:
        with atomic_file(path) as staged:
            staged.write_bytes(kept)
    return max((line["step"] for line, _ in lines), default=0)


def _comes_again(line: Mapping[str, Any], resume_step: int | None) -> bool:
    if resume_step is None or line["step"] < resume_step:
        return False
    return line["step"] > resume_step or any(key.startswith(VALIDATION) for key in line)


def _now() -> float:
    return round(time.time(), 3)
