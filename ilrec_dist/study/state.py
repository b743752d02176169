"""How the last attempt at a cell ended, in a file beside the cell's folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ilrec_dist.common.files import write_json
from ilrec_dist.reporting.results import RESULTS_FILE
from ilrec_dist.study.cells import Cell
from ilrec_dist.study.provenance import commit, machine

# What the command line's errors begin with.
ERROR = "ilrec: error: "
# refused: the command ended with the user's own error, such as a loss that is not finite, which
# it would meet again. failed: its workers failed. killed: a signal ended the command.
Outcome = Literal["done", "refused", "failed", "killed", "interrupted"]


@dataclass(frozen=True)
class CellState:
    outcome: Outcome
    # One line, "" for a cell that is done.
    reason: str
    # Of the cell's last stage: whether the state is that of today's settings and input.
    fingerprint: str
    # Wall time of the attempt.
    seconds: float
    commit: str
    machine: str
    # Whether its workers took cores or GPUs, and how many; None where none were started.
    unit: Literal["CPU", "GPU"] = "CPU"
    takes: int | None = None


def write_state(
    cell: Cell,
    outcome: Outcome,
    reason: str,
    seconds: float,
    unit: Literal["CPU", "GPU"] = "CPU",
    takes: int | None = None,
) -> None:
    """Note how an attempt at the cell ended, and what of the room its workers took."""
    state = CellState(
        outcome, reason, cell.fingerprint(), seconds, commit(), machine(), unit, takes
    )
    write_json(cell.state_file, asdict(state))


def read_state(cell: Cell) -> CellState | None:
    """The state of the last attempt with today's
    settings and input; None where there is none.
    """
    try:
        state = CellState(**json.loads(Path(cell.state_file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return state if state.fingerprint == cell.fingerprint() else None


def is_done(cell: Cell) -> bool:
    """Whether the cell's figures are there, of today's settings and input."""
    state = read_state(cell)
    return (
        state is not None
        and state.outcome == "done"
        and all(cell.run.is_current(name) for name in (*cell.trainings, cell.evaluation))
        and (cell.folder / RESULTS_FILE).exists()
    )


def exit_outcome(code: int, log: Path) -> tuple[Outcome, str]:
    """What the exit code of a cell's command means, and its last words."""
    if code == 0:
        return "done", ""
    if code < 0:
        return "killed", f"by signal {-code}" + (
            " (the system ends a process so when memory runs out)" if code == -9 else ""
        )
    last = _last_line(log)
    if code == 2:
        return "refused", last
    if code in (130, 143):
        return "interrupted", "the same command goes on"
    return "failed", last or f"exit code {code}"


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    # Libraries may have said something after it.
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    return (errors or lines or [""])[-1]
