"""What the finished cells of a study took, in hours of cores or GPUs, beside what was
estimated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilrec_dist.common.files import write_json
from ilrec_dist.launch.room import Room
from ilrec_dist.study.cells import Cell
from ilrec_dist.study.estimate import Estimate, is_trained
from ilrec_dist.study.state import read_state

# In the study's folder: the last estimate of each cell, by its title.
ESTIMATES = ".estimates.json"
HOUR = 3600.0


@dataclass(frozen=True)
class Hours:
    """Hours of one unit; a training that several cells have counts once."""

    unit: str
    cells: int
    training: float
    # Of each cell's last evaluation.
    evaluation: float
    # The cells with an estimate, what was estimated for them, and what they took.
    estimated_cells: int
    estimated: float
    of_estimated: float

    @property
    def total(self) -> float:
        return self.training + self.evaluation

    def sentence(self) -> str:
        took = (
            f"Its cells took {self.total:.2f} {self.unit}-hours: {self.training:.2f} of training "
            f"and {self.evaluation:.2f} of evaluation"
        )
        if not self.estimated_cells:
            return f"{took}; there was no estimate."
        estimated = f"{self.estimated:.2f} had been estimated"
        if self.estimated_cells == self.cells:
            return f"{took}; {estimated}."
        return (
            f"{took}. For {self.estimated_cells} of the {self.cells} cells {estimated}, and they "
            f"took {self.of_estimated:.2f}."
        )


def hours_taken(folder: Path, done: Sequence[Cell]) -> list[Hours]:
    """By unit, from the records of the cells' stages; `folder` is the study's."""
    estimates = _read_estimates(folder)
    counted: set[str] = set()
    by_unit: dict[str, list[_CellHours]] = {}
    for cell in done:
        unit, share = _unit_and_share(cell)
        seconds = cell.run.stage_seconds()
        training = 0.0
        for name in cell.trainings:
            if cell.run.fingerprint(name) not in counted:
                counted.add(cell.run.fingerprint(name))
                training += seconds.get(name, 0.0)
        entry = estimates.get(cell.title, {})
        estimated = entry.get("seconds") if entry.get("of") == _estimated(cell) else None
        hours = _CellHours(
            training * share / HOUR,
            seconds.get(cell.evaluation, 0.0) * share / HOUR,
            None if estimated is None else estimated * share / HOUR,
        )
        by_unit.setdefault(unit, []).append(hours)
    return [_sum(unit, cells) for unit, cells in by_unit.items()]


@dataclass(frozen=True)
class _CellHours:
    training: float
    evaluation: float
    estimated: float | None


def _sum(unit: str, cells: Sequence[_CellHours]) -> Hours:
    known = [(cell, cell.estimated) for cell in cells if cell.estimated is not None]
    return Hours(
        unit,
        len(cells),
        sum(cell.training for cell in cells),
        sum(cell.evaluation for cell in cells),
        len(known),
        sum(estimated for _, estimated in known),
        sum(cell.training + cell.evaluation for cell, _ in known),
    )


def _unit_and_share(cell: Cell) -> tuple[str, int]:
    """What the cell's workers took, and how many of it."""
    state = read_state(cell)
    if state is not None and state.takes is not None:
        return ("GPU" if state.unit == "GPU" else "core"), state.takes
    # A state of an earlier version: cells ran on this machine's cores.
    return "core", Room("CPU", 0).needed_by(cell.config.launch)


def note_estimates(folder: Path, cells: Sequence[Cell], estimates: Mapping[str, Estimate]) -> None:
    """Keep the estimates of cells that are about to be trained."""
    notes = _read_estimates(folder)
    for cell in cells:
        # That of a cell that is only evaluated again is none of its training.
        if not is_trained(cell):
            notes[cell.title] = {"of": _estimated(cell), "seconds": estimates[cell.title].seconds}
    write_json(folder / ESTIMATES, notes)


def _estimated(cell: Cell) -> str:
    """The fingerprint of the cell's own training, which an estimate is of."""
    return cell.run.fingerprint(cell.trainings[-1])


def _read_estimates(folder: Path) -> dict[str, Any]:
    try:
        notes = json.loads((folder / ESTIMATES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}
