"""Runs cells side by side, each as `ilrec run` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import write_text
from ilrec_dist.config.load import dump_config
from ilrec_dist.launch.room import Room
from ilrec_dist.launch.workers import end_with_parent
from ilrec_dist.study.cells import Cell
from ilrec_dist.study.priority import keep_priority
from ilrec_dist.study.shared import take_over
from ilrec_dist.study.state import exit_outcome, write_state

POLL_SECONDS = 0.3
# How long an interrupted cell may take to end its workers.
TERMINATE_SECONDS = 120.0


@dataclass
class RunningCell:
    """A cell's process."""

    cell: Cell
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float
    # What it takes of the room, and which GPUs of this machine.
    share: int
    devices: tuple[str, ...]


class Schedule:
    """The cells that wait, run and have ended.

    `jobs` limits how many run at once; None leaves that to the room.
    """

    def __init__(self, cells: Sequence[Cell], room: Room, jobs: int | None = None) -> None:
        self.room, self.jobs = room, jobs
        self.waiting = list(cells)
        self.running: list[RunningCell] = []
        self.ended: list[Cell] = []
        # The title of the cell that makes each training: others that have the same one wait for it.
        self._makers: dict[str, str] = {}
        for cell in cells:
            for name in cell.trainings:
                if not cell.run.is_current(name):
                    self._makers.setdefault(cell.run.fingerprint(name), cell.title)

    def run(self, watch: Callable[[Schedule], None]) -> None:
        """Run all cells; `watch` is called several times a second.

        An interruption ends the running cells, which
        go on from their checkpoints another time.
        """
        try:
            while self.waiting or self.running:
                self._start_what_fits()
                self._collect()
                watch(self)
                if self.running:
                    time.sleep(POLL_SECONDS)
        except BaseException:
            self._end_all()
            raise

    def _start_what_fits(self) -> None:
        for cell in list(self.waiting):
            if self._is_blocked(cell):
                continue
            if not self._fits(cell):
                return
            self.waiting.remove(cell)
            self._start(cell)

    def _is_blocked(self, cell: Cell) -> bool:
        """Whether a cell before it makes a training that it has too."""
        makers = {self._makers.get(cell.run.fingerprint(name)) for name in cell.trainings}
        unfinished = [*self.waiting, *(attempt.cell for attempt in self.running)]
        return any(other.title in makers and other is not cell for other in unfinished)

    def _fits(self, cell: Cell) -> bool:
        if not self.running:
            return True
        if self.jobs is not None:
            return len(self.running) < self.jobs
        used = sum(attempt.share for attempt in self.running)
        return used + self.room.needed_by(cell.config.launch) <= self.room.total

    def _start(self, cell: Cell) -> None:
        began = time.monotonic()
        try:
            take_over(cell)
        except UserError as error:
            write_state(cell, "failed", str(error), 0.0)
            self.ended.append(cell)
            return
        write_text(cell.config_file, dump_config(cell.config))
        share = self.room.needed_by(cell.config.launch)
        taken = {device for attempt in self.running for device in attempt.devices}
        free = tuple(device for device in self.room.devices if device not in taken)
        # More cells than the GPUs have room for, as --jobs may ask, share all of them.
        devices = free[:share] if len(free) >= share else ()
        environment = dict(os.environ)
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        log = open(cell.log_file, "wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "ilrec_dist.cli", "run", str(cell.config_file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            # Ctrl-C reaches this process alone, which then ends the cells in order.
            start_new_session=True,
            preexec_fn=_beginning(),
        )
        self.running.append(RunningCell(cell, process, log, began, share, devices))

    def _collect(self) -> None:
        for attempt in list(self.running):
            code = attempt.process.poll()
            if code is not None:
                self._note_end(attempt, code)

    def _note_end(self, attempt: RunningCell, code: int) -> None:
        attempt.log.close()
        self.running.remove(attempt)
        self.ended.append(attempt.cell)
        outcome, reason = exit_outcome(code, attempt.cell.log_file)
        seconds = time.monotonic() - attempt.began
        write_state(attempt.cell, outcome, reason, seconds, self.room.unit, attempt.share)

    def _end_all(self) -> None:
        for attempt in self.running:
            attempt.process.terminate()
        until = time.monotonic() + TERMINATE_SECONDS
        for attempt in list(self.running):
            with suppress(subprocess.TimeoutExpired):
                attempt.process.wait(max(0.0, until - time.monotonic()))
            attempt.process.kill()
            self._note_end(attempt, attempt.process.wait())


def _beginning() -> Callable[[], None]:
    """What the process of a cell calls before all else."""
    # Made here: what it loads must be there before the process is forked.
    end = end_with_parent()

    def begin() -> None:
        keep_priority()
        if end is not None:
            end()

    return begin


def side_by_side(cells: Sequence[Cell], room: Room, jobs: int | None) -> int:
    """How many of the cells run at once, for the estimate."""
    shares = [room.needed_by(cell.config.launch) for cell in cells]
    fitting = room.total // max(shares, default=1)
    return max(1, min(len(cells), jobs if jobs is not None else fitting))
