"""`ilrec study STUDY.yaml`: runs what is missing
of a grid of runs, and makes its one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ilrec_dist.common.console import print_plain
from ilrec_dist.common.disk import not_writable
from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.common.files import file_lock, write_json, write_text
from ilrec_dist.config.tree import ConfigError
from ilrec_dist.launch.room import find_room
from ilrec_dist.reporting.html.report import REPORT_FILE
from ilrec_dist.reporting.results import RESULTS_FILE
from ilrec_dist.study.cells import Cell, make_cells
from ilrec_dist.study.config import StudyConfig, load_study
from ilrec_dist.study.estimate import describe, estimate_cells, time_cells
from ilrec_dist.study.figures import StudyFigures, check_against, collect
from ilrec_dist.study.hours import note_estimates
from ilrec_dist.study.page import write_page
from ilrec_dist.study.priority import lower_priority
from ilrec_dist.study.schedule import Schedule, side_by_side
from ilrec_dist.study.shared import SharedRun, shared_runs
from ilrec_dist.study.state import is_done, read_state, write_state
from ilrec_dist.study.table import around_table, as_json, markdown, write_csv, write_into
from ilrec_dist.study.watch import watching

TABLE_FILE, CSV_FILE = "results.md", "results.csv"


def run_study(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    jobs: int | None = None,
    low_priority: bool = False,
    retry: bool = False,
    estimate_only: bool = False,
    time_steps: bool = True,
    into: Path | None = None,
) -> None:
    """Run the cells that are not done, and write the table.

    An interruption writes the table of what is done by then.

    jobs: cells at once, None for as many as there is room for. retry: run cells again
    that were refused. estimate_only: end after the estimate. time_steps: time steps for
    the estimate where no cell is finished. into: a Markdown file that gets the table.
    Raises UserError for the study's own mistakes, and WorkersFailed where cells are
    missing at the end.
    """
    study, of_cells = load_study(path, overrides)
    cells = make_cells(study, path, of_cells)
    try:
        check_against(study, cells)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if into is not None:
        # It is refused before the cells take their hours.
        around_table(into, study.name)
    if low_priority:
        lower_priority()
    with _alone(study.folder):
        shared = [run for run in shared_runs(cells) if _is_made(run)]
        made = {cell.title for run in shared for cell in run.cells}
        pending = [cell for cell in cells if cell.title in made and _is_pending(cell, retry)]
        if not pending:
            print_plain("nothing to run")
        else:
            try:
                _run_cells(study, cells, pending, shared, jobs, estimate_only, time_steps)
            except KeyboardInterrupt:
                if any(is_done(cell) for cell in cells):
                    _make_table(study, cells, into)
                raise
        if estimate_only:
            return
        figures = _make_table(study, cells, into)
    missing = figures.missing()
    if missing:
        raise WorkersFailed(
            f"{len(missing)} of {len(cells)} cells are missing, {missing[0].cell.title} among them "
            f"({missing[0].missing_reason()}); {study.folder / TABLE_FILE} lists all. The same "
            "command runs them again, those that were refused with --retry"
        )


def _make_table(study: StudyConfig, cells: Sequence[Cell], into: Path | None) -> StudyFigures:
    figures = collect(study, cells)
    write_figures(figures)
    if into is not None:
        write_into(into, study.name, markdown(figures))
        print_plain(f"table: {into}")
    return figures


def write_figures(figures: StudyFigures) -> None:
    """Write results.md, results.csv, results.json
    and report.html, and print the table.
    """
    folder = figures.study.folder
    write_text(folder / TABLE_FILE, markdown(figures))
    write_csv(figures, folder / CSV_FILE)
    write_json(folder / RESULTS_FILE, as_json(figures))
    write_page(figures, folder / REPORT_FILE)
    print_plain(markdown(figures))
    print_plain(f"table: {folder / TABLE_FILE}   report: {folder / REPORT_FILE}")


def _run_cells(
    study: StudyConfig,
    cells: Sequence[Cell],
    pending: Sequence[Cell],
    shared: Sequence[SharedRun],
    jobs: int | None,
    estimate_only: bool,
    time_steps: bool,
) -> None:
    """Say how long the pending cells will take, and run them."""
    done = [cell for cell in cells if is_done(cell)]
    timed = time_cells(pending, done, shared, study.folder / ".timing") if time_steps else {}
    estimates = estimate_cells(pending, done, shared, timed)
    room = find_room(pending[0].config.launch)
    parallel = side_by_side(pending, room, jobs)
    print_plain(describe(estimates, parallel))
    if estimate_only:
        return
    note_estimates(study.folder, pending, estimates)
    with watching(study.name, pending, estimates, parallel) as watch:
        Schedule(pending, room, jobs).run(watch)


def _is_made(shared: SharedRun) -> bool:
    """Make what cells share; where that fails, say
    so of its cells, and go on with the others.
    """
    try:
        shared.make()
        return True
    except (UserError, WorkersFailed) as error:
        print_plain(f"{shared.cells[0].configuration}: {error}")
        for cell in shared.cells:
            write_state(cell, "failed", str(error), 0.0)
        return False


def _is_pending(cell: Cell, retry: bool) -> bool:
    if is_done(cell):
        return False
    state = read_state(cell)
    return retry or state is None or state.outcome != "refused"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the study's folder and hold it; the
    system lets go of it when this process dies.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(error, folder) or UserError(
            f"{folder}: cannot be used as the study's folder ({error.strerror}); choose another "
            "runs_dir or name"
        ) from None
    lock = file_lock(folder, wait=False)
    try:
        lock.__enter__()
    except BlockingIOError:
        raise UserError(
            f"{folder}: another `ilrec study` is at work in this folder; wait for its end"
        ) from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
