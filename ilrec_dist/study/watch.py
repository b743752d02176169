"""Shows a study's progress: a bar over its cells, and a line for each that ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ilrec_dist.common.console import console, print_plain
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.reporting.progress import LogFollower, TrainingState, clock, live_bar
from ilrec_dist.study.cells import Cell
from ilrec_dist.study.estimate import Estimate
from ilrec_dist.study.schedule import Schedule
from ilrec_dist.study.state import read_state

# Seconds between two looks at the running cells' logs.
LOOK_SECONDS = 2.0
# The part of a cell's time that its training takes, about.
TRAINING_SHARE = 0.9


@contextmanager
def watching(
    title: str, pending: Sequence[Cell], estimates: Mapping[str, Estimate], parallel: int
) -> Iterator[Callable[[Schedule], None]]:
    """A bar over the pending cells; the function
    that it yields shows the schedule's state.
    """
    with live_bar(title, len(pending), console) as show:
        yield _Watch(pending, estimates, parallel, show)


class _Watch:
    def __init__(
        self,
        pending: Sequence[Cell],
        estimates: Mapping[str, Estimate],
        parallel: int,
        show: Callable[[float, list[str]], None],
    ) -> None:
        self.pending, self.estimates, self.parallel, self.show = pending, estimates, parallel, show
        known = [estimate.seconds for estimate in estimates.values() if estimate.seconds]
        # Where nothing is known, all cells count alike.
        self.typical = sum(known) / len(known) if known else None
        self._training: dict[str, tuple[LogFollower, TrainingState]] = {}
        self._ended = 0
        self._next_look = 0.0

    def __call__(self, schedule: Schedule) -> None:
        for cell in schedule.ended[self._ended :]:
            self._say_end(cell)
        self._ended = len(schedule.ended)
        now = time.monotonic()
        if now < self._next_look and schedule.running:
            return
        self._next_look = now + LOOK_SECONDS
        shares = {attempt.cell.title: self._share(attempt.cell) for attempt in schedule.running}
        done = len(schedule.ended) + sum(shares.values())
        parts = [f"{len(schedule.ended)}/{len(self.pending)} cells"]
        left = self._seconds_left(schedule, shares)
        if left is not None:
            parts.append(f"{clock(left)} left")
        parts += [f"{title} {share:.0%}" for title, share in shares.items()]
        # A plain log shows nothing before something is done.
        self.show(max(done, 1e-6), parts)

    def _seconds_left(self, schedule: Schedule, shares: Mapping[str, float]) -> float | None:
        """From the estimates, corrected by how long the ended cells took."""
        waiting = [self._seconds(cell) for cell in schedule.waiting]
        running = [
            self._seconds(attempt.cell) * (1 - shares[attempt.cell.title])
            for attempt in schedule.running
        ]
        ended = [
            (state.seconds, self._seconds(cell))
            for cell in schedule.ended
            if (state := read_state(cell)) is not None and state.outcome == "done"
        ]
        took, expected = sum(seconds for seconds, _ in ended), sum(seconds for _, seconds in ended)
        if self.typical is None and not ended:
            return None
        correction = took / expected if expected else 1.0
        return max([sum([*waiting, *running]) / self.parallel, *running, 0.0]) * correction

    def _seconds(self, cell: Cell) -> float:
        return self.estimates[cell.title].seconds or self.typical or 1.0

    def _share(self, cell: Cell) -> float:
        """How much of the cell is done, by the steps that its training has logged."""
        if cell.title not in self._training:
            folder = RunFolders(cell.folder).training(cell.method, cell.seed)
            state = TrainingState(self.estimates[cell.title].steps)
            self._training[cell.title] = LogFollower(folder), state
        follower, state = self._training[cell.title]
        for line in follower.read():
            state.see(line)
        return TRAINING_SHARE * min(1.0, state.step / state.total_steps)

    def _say_end(self, cell: Cell) -> None:
        state = read_state(cell)
        if state is None:
            return
        words = (
            f"done in {clock(state.seconds)}"
            if state.outcome == "done"
            else f"{state.outcome}: {state.reason}"
        )
        print_plain(f"{cell.title}: {words}")
