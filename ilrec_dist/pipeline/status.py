"""What `ilrec status` tells of a run, from its
folder alone: any machine that sees it can ask.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.run_layout import COUNTER, RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.launch.attempts import Attempt, read_attempts, read_workers
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.execute import open_run
from ilrec_dist.pipeline.method_settings import training_settings
from ilrec_dist.pipeline.run_config import run_config
from ilrec_dist.reporting.counter import read_counter
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.reporting.progress import TrainingState, clock
from ilrec_dist.training.checkpoint import MANIFEST, committed, read_manifest
from ilrec_dist.training.spec import TrainingSpec

# Of the latest restarts, so many are listed.
SHOWN_RESTARTS = 5


def status_lines(folder: Path, now: float | None = None) -> Iterator[str]:
    """One line a fact; what cannot be read is named, and the rest told.

    Raises UserError for a folder that is no run's.
    """
    config = run_config(folder)
    now = time.time() if now is None else now
    run, folders = open_run(config), RunFolders(config.run_dir)
    for name, stage in run.stages.items():
        record, begun = run.record(name), run.begun(name)
        if record is not None:
            yield f"{name}: done in {clock(record['seconds'])}"
        elif begun is None:
            yield f"{name}: not begun"
        elif stage.training is None:
            yield f"{name}: {', '.join(_counted(name, folders, now))}"
        else:
            yield f"{name}: {', '.join(_training(config, stage.training, now))}"
            yield from _checkpoint(stage.output, now)
    yield from _workers(folders.trainings, now)


def _counted(name: str, folders: RunFolders, now: float) -> Iterator[str]:
    """How far a stage is that is no training, where it counts what it does."""
    folder, unit = {
        "cf": (folders.cf_work, "epochs"),
        "evaluate": (folders.evaluation, "rankings"),
    }.get(name, (None, ""))
    counted = None if folder is None else read_counter(folder / COUNTER)
    if counted is None:
        yield "begun, not done"
        return
    count, when = counted
    of_what = "" if count.title == name else f"{count.title} "
    yield f"{of_what}{count.done:,.0f}/{count.total:,.0f} {unit}"
    if count.note:
        yield count.note
    yield f"last count {clock(now - when)} ago"


def _training(config: Config, spec: TrainingSpec, now: float) -> Iterator[str]:
    try:
        lines = read_metrics(spec.folder)
    except UserError as damaged:
        yield str(damaged)
        return
    if not lines:
        yield "begun, no step logged yet"
        return
    last = next((line for line in reversed(lines) if _is_positive(line.get("epoch"))), None)
    epochs = training_settings(config, get_method(spec.method)).epochs
    total = 0 if last is None else round(last["step"] / last["epoch"] * epochs)
    state = TrainingState(total)
    for line in lines:
        state.see(line)
    yield from state.parts()
    times = [line["time"] for line in lines if _is_positive(line.get("time"))]
    if times:
        yield f"last line {clock(now - times[-1])} ago"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def _checkpoint(folder: Path, now: float) -> Iterator[str]:
    for checkpoint in reversed(committed(folder / "checkpoints")):
        manifest = checkpoint / MANIFEST
        try:
            step, written = read_manifest(manifest)["step"], manifest.stat().st_mtime
        except (OSError, UserError):
            # One that the training itself has just removed is not damaged.
            if checkpoint.is_dir():
                yield f"  {manifest}: missing, malformed, or not as it was written"
            continue
        yield f"  last checkpoint: step {step:,}, {clock(now - written)} ago"
        return
    yield "  no checkpoint yet"


def _workers(folder: Path, now: float) -> Iterator[str]:
    attempts = read_attempts(folder)
    if not attempts:
        return
    last = attempts[-1]
    workers = read_workers(folder, last.workers)
    nodes = {(str(worker["host"]), str(worker["node"])) for worker in workers}
    hosts = ", ".join(sorted({host for host, _ in nodes}))
    where = f" on {len(nodes)} node{'s' * (len(nodes) != 1)} ({hosts})" if nodes else ""
    yield f"workers: {last.workers}{where}, begun {clock(now - last.time)} ago"
    restarts = [attempt for attempt in attempts if attempt.is_restart]
    yield f"restarts: {len(restarts)}"
    yield from (f"  {_restart(attempt, now)}" for attempt in restarts[-SHOWN_RESTARTS:])


def _restart(attempt: Attempt, now: float) -> str:
    return f"{clock(now - attempt.time)} ago: {attempt.reason}"
