"""Progress in the driver's terminal: a training
through its metrics.jsonl, a bar for other stages.

A terminal gets one live bar; a pipe or a log
file gets a plain line about every ten seconds.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from ilrec_dist.reporting.counter import latest_counts
from ilrec_dist.reporting.metrics_log import METRICS_FILE, RESUMED, parse_line

# Seconds between two lines where there is no terminal.
PLAIN_SECONDS = 10.0
# Logged lines that the remaining time is estimated from.
RATE_LINES = 20


class LogFollower:
    """Reads the lines that were added to a metrics.jsonl since the last read.

    It starts over when the file was replaced or
    cut; a line that is not whole yet is left.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / METRICS_FILE
        self._inode, self._offset = -1, 0

    def read(self) -> list[dict[str, Any]]:
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [line for raw in whole.splitlines() if (line := parse_line(raw)) is not None]


class TrainingState:
    """What the bar shows, from the lines seen so far."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.step = 0
        self.loss: float | None = None
        self.tokens_per_second: float | None = None
        self.mfu: float | None = None
        self.ndcg: float | None = None
        self._pace: deque[tuple[int, float]] = deque(maxlen=RATE_LINES)

    def see(self, line: dict[str, Any]) -> None:
        step = line["step"]
        if step < self.step or RESUMED in line:
            # The run went back to a checkpoint, or waited for one: its old pace says nothing.
            self._pace.clear()
        self.step = step
        if isinstance(line.get("time"), int | float) and (
            not self._pace or step > self._pace[-1][0]
        ):
            self._pace.append((step, line["time"]))
        self.loss = _number(line, "loss/total", self.loss)
        self.tokens_per_second = _number(line, "rate/tokens_per_second", self.tokens_per_second)
        self.mfu = _number(line, "rate/mfu", self.mfu)
        self.ndcg = _number(line, "validation/ndcg@10", self.ndcg)

    def seconds_left(self) -> float | None:
        """From the pace of the last lines, validation
        included; None before there are two.
        """
        if len(self._pace) < 2:
            return None
        (first, since), (last, until) = self._pace[0], self._pace[-1]
        if until <= since:
            return None
        return max(0, self.total_steps - last) * (until - since) / (last - first)

    def parts(self) -> list[str]:
        left = self.seconds_left()
        shown = [f"step {self.step:,}/{self.total_steps:,}"]
        if self.tokens_per_second is not None:
            shown.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.mfu is not None:
            shown.append(f"MFU {self.mfu:.1%}")
        if self.loss is not None:
            shown.append(f"loss {self.loss:.4f}")
        if self.ndcg is not None:
            shown.append(f"val NDCG@10 {self.ndcg:.4f}")
        if left is not None and self.step < self.total_steps:
            shown.append(f"{clock(left)} left")
        return shown


class LiveProgress:
    """Follows the training run that writes into
    `folder` and shows it until the context ends.

    `with LiveProgress(folder, total_steps=2000, title="…"):
    start_workers_and_wait()` reads metrics.jsonl in a thread, so the driver
    may block. `total_steps` is that of the whole run, also when it resumes.
    """

    def __init__(
        self,
        folder: str | Path,
        total_steps: int,
        title: str,
        console: Console | None = None,
        poll_seconds: float = 0.5,
    ) -> None:
        self.state = TrainingState(total_steps)
        # Whether a context that ends without an error means that the run is finished.
        self.finished = True
        self._follower = LogFollower(folder)
        self._poll_seconds = poll_seconds
        self._display = _display(title, float(total_steps), console or Console())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="live-progress", daemon=True)

    def __enter__(self) -> LiveProgress:
        self._display.start()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self._display.stop(done=kind is None and self.finished)

    def _follow(self) -> None:
        while not self._stop.wait(self._poll_seconds):
            self._look()

    def _look(self) -> None:
        for line in self._follower.read():
            self.state.see(line)
        self._display.show(self.state.step, self.state.parts())


class StageProgress:
    """The bar of one stage, called from one
    thread: `progress(epoch + 1, "loss 5.21")`.
    """

    def __init__(
        self, display: _Terminal | _Plain, total: float | None, unit: str, before: float = 0
    ) -> None:
        self._display, self._total, self._unit, self._before = display, total, unit, before
        self._done = 0.0
        self._since = time.monotonic()

    def __call__(self, done: float, note: str = "") -> None:
        """Show `done` of the total, absolute, and `note` behind it."""
        self._done = done
        parts = [
            f"{done:,.0f}"
            + (f"/{self._total:,.0f}" if self._total is not None else "")
            + f" {self._unit}".rstrip()
        ]
        seconds = time.monotonic() - self._since
        if done > self._before and seconds > 0:
            rate = (done - self._before) / seconds
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s")
            if self._total is not None and done < self._total:
                parts.append(f"{clock((self._total - done) / rate)} left")
        if note:
            parts.append(note)
        self._display.show(done, parts)

    def advance(self, amount: float = 1, note: str = "") -> None:
        self(self._done + amount, note)


@contextmanager
def stage_progress(
    title: str,
    total: float | None = None,
    unit: str = "",
    console: Console | None = None,
    before: float = 0,
) -> Iterator[StageProgress]:
    """A bar for a stage that is no training: `with
    stage_progress("cf", 20, "epochs") as progress`.

    Without a total it only shows that work goes
    on. At its end it shows the time that it took.
    What was done `before` it began tells no rate.
    """
    display = _display(title, total, console or Console())
    display.start()
    done = False
    try:
        yield StageProgress(display, total, unit, before)
        done = True
    finally:
        display.stop(done)


@contextmanager
def live_bar(
    title: str, total: float, console: Console | None = None
) -> Iterator[Callable[[float, list[str]], None]]:
    """A bar whose words are the caller's: `with
    live_bar("study", 14) as show: show(3, ["3/14"])`.

    At its end it shows the time that the block took.
    """
    display = _display(title, total, console or Console())
    display.start()
    done = False
    try:
        yield display.show
        done = True
    finally:
        display.stop(done)


def follow_counter(path: Path, unit: str, stop: threading.Event, poll_seconds: float = 0.5) -> None:
    """Show what another process writes to `path` by
    `write_counter`, until `stop` is set (see `following`).

    A bar ends where all is done or another title comes, and shows nothing while no
    count comes. Where several processes have parts of the work, each writes to a file
    of its own, whose name begins with that of `path`.
    """
    counts = latest_counts(path, stop, poll_seconds)
    count = next(counts, None)
    while count is not None:
        title = count.title
        with stage_progress(title, count.total, unit, before=count.done) as show_progress:
            while (
                not count.is_finished
                and (count := next(counts, None)) is not None
                and count.title == title
            ):
                show_progress(count.done, count.note)
        while count is not None and count.title == title and count.is_finished:
            count = next(counts, None)


@contextmanager
def following(follow: Callable[[threading.Event], None]) -> Iterator[None]:
    """Show what other processes do, during the block: `follow`
    runs in a thread, and is to end when its event is set.
    """
    stop = threading.Event()
    thread = threading.Thread(target=follow, args=(stop,), name="following", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def clock(seconds: float) -> str:
    """3725.2 → 1:02:05, 65 → 1:05, 4.2 → 0:04."""
    whole = int(round(seconds))
    hours, minutes, remainder = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{remainder:02d}" if hours else f"{minutes}:{remainder:02d}"


def _number(line: dict[str, Any], key: str, before: float | None) -> float | None:
    value = line.get(key)
    return float(value) if isinstance(value, int | float) else before


def _display(title: str, total: float | None, console: Console) -> _Terminal | _Plain:
    return (
        _Terminal(title, total, console) if console.is_terminal else _Plain(title, total, console)
    )


class _Elapsed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(clock(task.elapsed or 0), style="dim")


class _Terminal:
    """One rich bar."""

    def __init__(self, title: str, total: float | None, console: Console) -> None:
        name = TextColumn(
            "{task.description}",
            style="bold",
            markup=False,
            table_column=Column(no_wrap=True, min_width=min(len(title), 30)),
        )
        news = TextColumn("{task.fields[shown]}", markup=False, table_column=Column())
        # A narrow terminal has room for the news alone.
        extent = (BarColumn(20), news, _Elapsed()) if console.width >= 120 else (news,)
        columns = (SpinnerColumn(finished_text="✓"), name, *extent)
        self._progress = RichProgress(*columns, console=console, refresh_per_second=4)
        self._title, self._total = title, total
        self._task: Any = None

    def start(self) -> None:
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=self._total, shown="")

    def show(self, done: float, parts: list[str]) -> None:
        self._progress.update(self._task, completed=done, shown=" · ".join(parts))

    def stop(self, done: bool) -> None:
        if done and self._total is None:
            self._progress.update(self._task, total=1, completed=1)
        self._progress.stop()


class _Plain:
    """Lines for a log: the first one at once, then
    one every PLAIN_SECONDS, and one at the end.
    """

    def __init__(self, title: str, total: float | None, console: Console) -> None:
        self._title, self._total, self._console = title, total, console
        self._since = time.monotonic()
        self._printed: float | None = None
        self._pending: list[str] | None = None
        self._last: list[str] | None = None

    def start(self) -> None:
        self._since = time.monotonic()

    def show(self, done: float, parts: list[str]) -> None:
        if done <= 0 or parts == self._last:
            return
        self._pending = parts
        now = time.monotonic()
        if self._printed is None or now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            self._print()

    def stop(self, done: bool) -> None:
        if self._pending is not None:
            self._print()
        outcome = "done" if done else "stopped"
        self._say(f"{self._title}: {outcome} after {clock(time.monotonic() - self._since)}")

    def _print(self) -> None:
        self._last, self._pending = self._pending, None
        self._say(f"{self._title}: {' · '.join(self._last or [])}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
