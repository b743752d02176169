"""What cells share: data, codes and CF models
are made once, in run folders of their own.

Cells take the finished stages over, as they take
over each other's trainings where these are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ilrec_dist.common.run_layout import STAGES
from ilrec_dist.config.tree import Config
from ilrec_dist.pipeline.adopt import adopt_stages
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import execute, open_run
from ilrec_dist.study.cells import Cell

NAME = "shared"


@dataclass(frozen=True)
class SharedRun:
    """A run up to its CF models, and the cells that stand on it."""

    config: Config
    cells: tuple[Cell, ...]

    @cached_property
    def artifacts(self) -> RunArtifacts:
        return RunArtifacts(self.config)

    def is_current(self) -> bool:
        run = open_run(self.config)
        return all(run.is_current(name) for name in self.cells[0].shared_stages)

    def make(self) -> None:
        """Make the stages that are not current. Raises UserError and WorkersFailed."""
        names = self.cells[0].shared_stages
        adopt_stages(open_run(self.config), run_folders(self.config.run_dir), names)
        if self.is_current():
            return
        stages = self.cells[0].run.stages
        commands = [stages[name].command for name in names]
        for command in dict.fromkeys(commands):
            execute(self.config, command)


def shared_runs(cells: Sequence[Cell]) -> list[SharedRun]:
    """The cells grouped by their shared stages:
    those of one group have the same fingerprints.
    """
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        fingerprints = (cell.run.fingerprint(name) for name in cell.shared_stages)
        groups.setdefault((cell.configuration, *fingerprints), []).append(cell)
    runs = []
    numbers: dict[str, int] = {}
    for (configuration, *_), members in groups.items():
        number = numbers[configuration] = numbers.get(configuration, 0) + 1
        name = NAME if number == 1 else f"{NAME}-{number}"
        config = dataclasses.replace(members[0].config, name=name)
        runs.append(SharedRun(config, tuple(members)))
    return runs


def run_folders(folder: Path) -> list[Path]:
    """The run folders of the study that `folder`
    is a run of, those that cells share first.
    """
    folders = [path.parent for path in folder.parent.parent.glob(f"*/*/{STAGES}")]
    return sorted(folders, key=lambda path: (not path.name.startswith(NAME), path.as_posix()))


def take_over(cell: Cell) -> list[str]:
    """Give the cell every finished stage that another folder of the study has."""
    return adopt_stages(cell.run, run_folders(cell.folder))
