"""Reads the finished cells into the rows of
the study's table, and chooses on validation.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object
from ilrec_dist.common.run_layout import RESULT, RunFolders
from ilrec_dist.config.tree import ConfigError
from ilrec_dist.evaluation.baselines.table import BASELINES
from ilrec_dist.evaluation.comparison import MethodFigures, paired_intervals
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.pipeline.stages.evaluate import method_labels, predictions_file
from ilrec_dist.pipeline.usage import read_peak_memory
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.reporting.results import (
    RESULTS_FILE,
    TRAINING_FLOPS,
    Figure,
    Interval,
    MethodLabel,
    Summary,
    summarise_rows,
)
from ilrec_dist.study.cells import DEFAULT, Cell, row_name
from ilrec_dist.study.config import StudyConfig
from ilrec_dist.study.hours import Hours, hours_taken
from ilrec_dist.study.state import CellState, is_done, read_state

SELECTION = "validation NDCG@10"


@dataclass(frozen=True)
class CellFigures:
    """What a cell came to; the figures are None where it is not done."""

    cell: Cell
    state: CellState | None
    # NDCG@10 of the best validation, which chose the weights, and its optimizer step.
    validation: float | None = None
    best_step: int | None = None
    # (epoch, NDCG@10) of every validation.
    curve: tuple[tuple[float, float], ...] = ()
    # Of the training, over all attempts, validations included.
    seconds: float | None = None
    # Of the training's largest worker.
    peak_memory_bytes: int | None = None

    @property
    def is_done(self) -> bool:
        return self.seconds is not None

    def missing_reason(self) -> str:
        if self.state is None:
            return "has not run yet"
        return f"{self.state.outcome}: {self.state.reason}"


@dataclass(frozen=True)
class Row:
    """A line of the table: a baseline, or a method with a setting over its seeds."""

    configuration: str
    summary: Summary
    # None for baselines, and for mixtures of a method with other models, which train nothing more.
    cells: tuple[CellFigures, ...] = ()
    intervals: tuple[Interval, ...] = ()

    @property
    def name(self) -> str:
        return self.summary.method

    def validation(self) -> Figure | None:
        return _figure(result.validation for result in self.cells)

    def flops(self) -> Figure | None:
        return self.summary.figures.get(TRAINING_FLOPS) if self.cells else None

    def seconds(self) -> Figure | None:
        return _figure(result.seconds for result in self.cells)

    def peak_memory(self) -> Figure | None:
        return _figure(result.peak_memory_bytes for result in self.cells)


@dataclass(frozen=True)
class Choice:
    """Which setting of a method validation chose, and what was compared for it."""

    configuration: str
    method: str
    chosen: str
    # The seeds that every setting has, over which the means are taken.
    seeds: tuple[int, ...]
    # Row → the mean of SELECTION.
    means: dict[str, float]
    # Rows without a finished cell in these seeds.
    left_out: tuple[str, ...]

    def sentence(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        return (
            f"{self.configuration}, {self.method}: `{self.chosen}` has the highest mean "
            f"{SELECTION} ({self.means[self.chosen]:.4f}) of {len(self.means)} settings, over "
            f"{'seed' if len(self.seeds) == 1 else 'seeds'} {seeds}"
        )


@dataclass(frozen=True)
class StudyFigures:
    study: StudyConfig
    cells: tuple[CellFigures, ...]
    rows: tuple[Row, ...]
    choices: tuple[Choice, ...]
    hours: tuple[Hours, ...] = ()

    def missing(self) -> list[CellFigures]:
        return [result for result in self.cells if not result.is_done]


def collect(study: StudyConfig, cells: Sequence[Cell]) -> StudyFigures:
    """Read what the cells' folders hold."""
    figures = [_cell_figures(cell) for cell in cells]
    rows: list[Row] = []
    for configuration in study.configurations:
        of_configuration = [
            result for result in figures if result.cell.configuration == configuration
        ]
        rows += _rows(study, configuration, of_configuration)
    hours = hours_taken(study.folder, [result.cell for result in figures if result.is_done])
    return StudyFigures(study, tuple(figures), tuple(rows), tuple(choices(figures)), tuple(hours))


def check_against(study: StudyConfig, cells: Sequence[Cell]) -> None:
    """Raise ConfigError where `against` names no row that the study can have."""
    names = {cell.row for cell in cells} | set(BASELINES)
    for name in study.against:
        if name not in names:
            raise ConfigError(
                f"key 'against': no row {name!r}; expected some of {', '.join(sorted(names))}"
            )


def choices(figures: Sequence[CellFigures]) -> list[Choice]:
    """For every method with several settings on a
    configuration, the one that validation prefers.

    The test split has no part in it.
    """
    groups: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for result in figures:
        rows = groups.setdefault((result.cell.configuration, result.cell.method), {})
        by_seed = rows.setdefault(result.cell.row, {})
        if result.validation is not None:
            by_seed[result.cell.seed] = result.validation
    made = []
    for (configuration, method), rows in groups.items():
        made += _choice(configuration, method, rows)
    return made


def _choice(configuration: str, method: str, rows: dict[str, dict[int, float]]) -> list[Choice]:
    present = {name: by_seed for name, by_seed in rows.items() if by_seed}
    if len(present) < 2:
        return []
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in present.values())))
    if not seeds:
        return []
    means = {
        name: statistics.fmean(by_seed[seed] for seed in seeds) for name, by_seed in present.items()
    }
    chosen = max(means, key=lambda name: means[name])
    left_out = tuple(name for name in rows if name not in present)
    return [Choice(configuration, method, chosen, tuple(seeds), means, left_out)]


def _cell_figures(cell: Cell) -> CellFigures:
    state = read_state(cell)
    if not is_done(cell):
        return CellFigures(cell, None if state is None or state.outcome == "done" else state)
    folder = RunFolders(cell.folder).training(cell.method, cell.seed)
    result = read_json_object(folder / RESULT)
    key = "validation/ndcg@10"
    curve = tuple(
        (float(line["epoch"]), float(line[key]))
        for line in read_metrics(folder)
        if isinstance(line.get(key), int | float)
    )
    return CellFigures(
        cell,
        state,
        float(result["best_ndcg"]),
        int(result["best_step"]),
        curve,
        float(result["seconds"]),
        read_peak_memory(folder),
    )


def _rows(study: StudyConfig, configuration: str, figures: Sequence[CellFigures]) -> list[Row]:
    """The rows of a configuration under both treatments of seen items."""
    done = [result for result in figures if result.is_done]
    if not done:
        return []
    entries: list[tuple[MethodFigures, CellFigures | None]] = []
    # The cells' baselines are the same, but for settings that change the CF model.
    first = min(done, key=lambda result: result.cell.setting != DEFAULT)
    for result in done:
        for row in read_json_object(result.cell.folder / RESULTS_FILE)["rows"]:
            is_own = row["method"].split("+")[0] == result.cell.method
            if is_own or (result is first and row["method"] in BASELINES):
                entries.append((_method_figures(result.cell, row), result if is_own else None))
    labels = _labels(figures)
    against = study.against or [row_name(study.methods[0], DEFAULT)]
    names = dict.fromkeys(entry.method for entry, _ in entries)
    compared = {name: [other for other in against if other != name] for name in names}
    intervals = paired_intervals([entry for entry, _ in entries], compared)
    rows = []
    for summary in summarise_rows([entry.row for entry, _ in entries], labels):
        cells = tuple(
            result
            for entry, result in entries
            if result is not None
            and result.cell.row == summary.method == entry.method
            and entry.exclude_seen == summary.exclude_seen
        )
        differences = tuple(
            interval
            for interval in intervals
            if interval.method == summary.method and interval.exclude_seen == summary.exclude_seen
        )
        rows.append(Row(configuration, summary, cells, differences))
    return rows


def _method_figures(cell: Cell, row: dict[str, Any]) -> MethodFigures:
    """A row of a cell's results with its values
    by user, under its name in the study's table.
    """
    name, is_baseline = row["method"], row["method"] in BASELINES
    path = predictions_file(
        cell.config, name, None if is_baseline else cell.seed, row["exclude_seen"]
    )
    if not path.exists():
        raise UserError(
            f"{path}: no such predictions, although {RESULTS_FILE} has their figures; run "
            f"`ilrec run {cell.config_file} --verify`"
        )
    shown = name if is_baseline else row_name(name, cell.setting)
    figures = MethodFigures.of(Predictions.load(path), shown, row["seed"])
    return dataclasses.replace(figures, row=row | {"method": shown})


def _labels(figures: Sequence[CellFigures]) -> list[MethodLabel]:
    """Names of rows in the order of the table: a
    method with its settings, then its mixtures.
    """
    settings: dict[str, list[str]] = {}
    for result in figures:
        of_method = settings.setdefault(result.cell.method, [])
        if result.cell.setting not in of_method:
            of_method.append(result.cell.setting)
    labels = []
    for label in method_labels():
        if label.name in BASELINES:
            labels.append(label)
        for setting in settings.get(label.name.split("+")[0], ()):
            name = row_name(label.name, setting)
            highlighted = label.highlighted and setting == DEFAULT
            labels.append(MethodLabel(name, row_name(label.title, setting), highlighted))
    return labels


def _figure(values: Iterable[float | None]) -> Figure | None:
    present = [float(value) for value in values if value is not None]
    if not present:
        return None
    return Figure(
        statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else None
    )
