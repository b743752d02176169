"""How long the pending cells will take: from finished cells, or from timed steps.

A cell's time is proportional to its optimizer steps.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.method_settings import training_settings
from ilrec_dist.pipeline.prompting import epoch_steps
from ilrec_dist.pipeline.step_time import TrainingTime, time_trainings
from ilrec_dist.reporting.progress import clock
from ilrec_dist.study.cells import Cell
from ilrec_dist.study.shared import SharedRun
from ilrec_dist.study.state import read_state

FROM_EVALUATION = "earlier evaluations of trained cells"
FROM_SAME = "finished cells of the same row"
FROM_METHOD = "finished cells of the same method"
FROM_OTHERS = "finished cells of other methods"
FROM_STEPS = "timed steps"
FROM_OTHER_STEPS = "timed steps of other rows"
UNKNOWN = "nothing yet"


@dataclass(frozen=True)
class Estimate:
    # Optimizer steps of the training.
    steps: int
    # Wall time of the cell; None where nothing was measured.
    seconds: float | None
    basis: str


def estimate_cells(
    pending: Sequence[Cell],
    done: Sequence[Cell],
    shared: Sequence[SharedRun],
    timed: Mapping[str, TrainingTime],
) -> dict[str, Estimate]:
    """The estimate of each pending cell, by its
    title. `timed` is what `time_cells` returned.
    """
    artifacts = _artifacts(shared)
    done = [cell for cell in done if cell.title in artifacts]
    steps = cell_steps([*pending, *done], shared)
    rates = [(cell, took / steps[cell.title]) for cell in done if (took := _seconds(cell))]
    estimates = {}
    for cell in pending:
        number = steps[cell.title]
        evaluated = cell.run.record(cell.evaluation) if is_trained(cell) else None
        if evaluated is not None:
            # At most as long again.
            estimates[cell.title] = Estimate(number, evaluated["seconds"], FROM_EVALUATION)
            continue
        rate, basis = _finished_rate(cell, rates)
        seconds = None if rate is None else rate * number
        if seconds is None:
            seconds, basis = _timed_seconds(cell, number, timed, artifacts[cell.title])
        estimates[cell.title] = Estimate(number, seconds, basis)
    return estimates


def is_trained(cell: Cell) -> bool:
    """Whether only the cell's evaluation is missing."""
    return all(cell.run.is_current(name) for name in cell.trainings)


def cell_steps(cells: Sequence[Cell], shared: Sequence[SharedRun]) -> dict[str, int]:
    """The optimizer steps of each cell's training, whose data are prepared."""
    artifacts = _artifacts(shared)
    steps = {}
    for cell in cells:
        epochs = training_settings(cell.config, get_method(cell.method)).epochs
        steps[cell.title] = max(1, epoch_steps(cell.config, artifacts[cell.title]) * epochs)
    return steps


def time_cells(
    pending: Sequence[Cell], done: Sequence[Cell], shared: Sequence[SharedRun], folder: Path
) -> dict[str, TrainingTime]:
    """Time steps of one cell of every row of the
    configurations that have no finished cell.

    One worker group for each shared run and section `launch`. Measured times by
    "configuration/row".
    """
    measured = {cell.configuration for cell in done}
    times: dict[str, TrainingTime] = {}
    for run in shared:
        groups: dict[object, dict[str, Cell]] = {}
        titles = {cell.title for cell in run.cells}
        for cell in pending:
            if is_trained(cell):
                continue
            if cell.title in titles and cell.configuration not in measured:
                rows = groups.setdefault(cell.config.launch, {})
                rows.setdefault(f"{cell.configuration}/{cell.row}", cell)
        for rows in groups.values():
            configs = [
                dataclasses.replace(cell.config, name=run.config.name) for cell in rows.values()
            ]
            try:
                timings = time_trainings(configs, folder)
            except (UserError, WorkersFailed):
                # The cells themselves will say what is wrong.
                continue
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            times |= {
                row: time for row, time in zip(rows, timings, strict=True) if time is not None
            }
    return times


def describe(estimates: Mapping[str, Estimate], side_by_side: int) -> str:
    """One line: the time of all pending cells, and what it rests on."""
    counts = Counter(estimate.basis for estimate in estimates.values())
    rests = ", ".join(f"{count} from {basis}" for basis, count in counts.items())
    known = [estimate.seconds for estimate in estimates.values() if estimate.seconds is not None]
    at_least = "at least " if len(known) < len(estimates) else ""
    return (
        f"estimate: {len(estimates)} cells, {at_least}"
        f"{clock(sum(known) / min(side_by_side, max(1, len(estimates))))} with {side_by_side} side "
        f"by side ({clock(sum(known))} one after another); it rests on: {rests}"
    )


def _artifacts(shared: Sequence[SharedRun]) -> dict[str, RunArtifacts]:
    return {cell.title: run.artifacts for run in shared for cell in run.cells}


def _seconds(cell: Cell) -> float:
    """Wall time of a finished cell: of its last
    attempt, or of its stages where that is more.
    """
    stages = cell.run.stage_seconds()
    state = read_state(cell)
    in_stages = sum(stages.get(name, 0.0) for name in (*cell.trainings, cell.evaluation))
    return max(in_stages, state.seconds if state is not None else 0.0)


def _finished_rate(cell: Cell, rates: Sequence[tuple[Cell, float]]) -> tuple[float | None, str]:
    """Seconds a step of the finished cells that are most like this one."""
    alike = [
        (finished, rate) for finished, rate in rates if finished.configuration == cell.configuration
    ]
    for basis, same in (
        (FROM_SAME, [rate for finished, rate in alike if finished.row == cell.row]),
        (FROM_METHOD, [rate for finished, rate in alike if finished.method == cell.method]),
        (FROM_OTHERS, [rate for _, rate in alike]),
    ):
        if same:
            return fmean(same), basis
    return None, UNKNOWN


def _timed_seconds(
    cell: Cell, steps: int, timed: Mapping[str, TrainingTime], artifacts: RunArtifacts
) -> tuple[float | None, str]:
    """From the timed steps of the cell's row, or
    the mean over other rows where it has none.
    """
    row = f"{cell.configuration}/{cell.row}"
    of_configuration = [
        timing for key, timing in timed.items() if key.startswith(f"{cell.configuration}/")
    ]
    if not of_configuration:
        return None, UNKNOWN
    basis = FROM_STEPS if row in timed else FROM_OTHER_STEPS
    chosen = [timed[row]] if row in timed else of_configuration
    config = cell.config
    validations = -(-config.train.epochs // config.train.validate_epochs)
    searched = validations * len(artifacts.validation_users(config.train.validation_users))
    # Both treatments of seen items.
    searched += 2 * len(artifacts.test_users(config.evaluation.users))
    # The driver of a cell starts about as slowly as its workers.
    seconds = [2 * timing.start + steps * timing.step + searched * timing.user for timing in chosen]
    return fmean(seconds), basis
