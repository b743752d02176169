"""The results of a run: results.json for
programs, and the table for people (METHOD.md §9).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ilrec_dist.common.files import write_json

RESULTS_FILE = "results.json"
# The metrics that every row has.
METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10")
# Measures beside accuracy that a row may have, with their titles and what they mean.
BEYOND_ACCURACY = {
    "coverage@10": ("Coverage@10", "share of the catalogue in some list"),
    "gini@10": ("Gini@10", "0: all items listed equally often; 1: one item takes all places"),
    "novelty@10": ("Novelty@10", "mean self-information of listed items, bits"),
    "diversity@10": ("Diversity@10", "1 − shared code prefix of two items of a list"),
    "calibration_error": ("Calibration error", "of a listed item's p as the probability of a hit"),
}
# What a trained row cost, with its title and what it means.
TRAINING_FLOPS = "training_flops"
COST = {
    TRAINING_FLOPS: (
        "Training FLOPs",
        "of the matrix products of all forward and backward passes, with those of the training "
        "that the method starts from and of its reference",
    ),
}
# Prefix of a row's expected-rank figures, such as expected_ndcg@10.
EXPECTED = "expected_"
# The standard error over users.
STANDARD_ERROR = "ndcg@10_se"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MethodLabel:
    """How tables and charts show one method or
    baseline; their order is the tables' order.
    """

    name: str
    title: str
    # Is shown emphasised.
    highlighted: bool = False
    # Knows the true distribution: it is shown as a bound and never as the best.
    is_bound: bool = False


@dataclass(frozen=True)
class Interval:
    """Paired bootstrap over users: `metric` of `method` minus that of `versus`."""

    method: str
    versus: str
    metric: str
    difference: float
    low: float
    high: float
    level: float = 0.95
    exclude_seen: bool = True

    def sentence(self) -> str:
        return (
            f"{self.method} − {self.versus}, {metric_title(self.metric)}: {self.difference:+.4f}, "
            f"{self.range()} over users"
        )

    def range(self) -> str:
        return f"paired {self.level:.0%} interval [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Figure:
    """A metric over the seeds of one method."""

    mean: float
    # The sample standard deviation; None for a single seed.
    std: float | None

    def text(self) -> str:
        return f"{self.mean:.4f}" if self.std is None else f"{self.mean:.4f} ± {self.std:.4f}"


@dataclass(frozen=True)
class Summary:
    """One line of the table: a method under one
    treatment of seen items, over its seeds.
    """

    label: MethodLabel
    exclude_seen: bool
    seeds: tuple[int, ...]
    users: int
    # Users whose list is empty, because their history holds every item.
    users_without_items: int
    # Metric to figure; expected-rank figures under their prefixed key.
    figures: Mapping[str, Figure]

    @property
    def method(self) -> str:
        return self.label.name


def write_results(
    path: str | Path,
    dataset: str,
    rows: Sequence[Row],
    seconds: float,
    stage_seconds: Mapping[str, float],
    extras: Mapping[str, Any] | None = None,
    intervals: Sequence[Interval] = (),
) -> dict[str, Any]:
    """Write results.json whole or not at all, and return what it holds.

    A row has method, the METRICS as fractions, users, seed (any value for methods that
    draw nothing) and exclude_seen; further keys stay, such as expected-rank figures.
    `seconds` is the sum of `stage_seconds`, each stage's wall time. `extras` are
    further top-level keys; intervals go under `paired_bootstrap`. Raises ValueError for
    a row that cannot be right.
    """
    checked = [_checked(row) for row in rows]
    fixed = {
        "dataset": dataset,
        "split": "test",
        "rows": checked,
        "seconds": seconds,
        "stage_seconds": dict(stage_seconds),
    }
    if intervals:
        fixed["paired_bootstrap"] = [asdict(interval) for interval in intervals]
    overlap = fixed.keys() & (extras or {}).keys()
    if overlap:
        raise ValueError(f"extras may not replace {sorted(overlap)}")
    results: dict[str, Any] = json.loads(
        json.dumps({**fixed, **(extras or {})}, allow_nan=False, default=_plain)
    )
    write_json(path, results)
    return results


def intervals_of(results: Mapping[str, Any]) -> list[Interval]:
    """The paired bootstrap intervals of a results dict."""
    return [Interval(**entry) for entry in results.get("paired_bootstrap", [])]


def summarise_rows(rows: Iterable[Row], labels: Sequence[MethodLabel] = ()) -> list[Summary]:
    """One Summary per method and treatment of seen items, over its seeds.

    Seen items excluded come first, methods in the order
    of `labels`; those without a label come last, by name.
    """
    groups: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((bool(row["exclude_seen"]), row["method"]), []).append(row)
    label_of = {label.name: label for label in labels}
    order = {name: number for number, name in enumerate(label_of)}
    keys = sorted(groups, key=lambda key: (not key[0], order.get(key[1], len(order)), key[1]))
    return [
        _summary(label_of.get(name, MethodLabel(name, name)), excluded, groups[excluded, name])
        for excluded, name in keys
    ]


def shown_metrics(
    summaries: Sequence[Summary], expected: Sequence[str] = ("ndcg@10",)
) -> list[str]:
    """The table's columns: the METRICS, then the
    expected-rank figures of `expected` if any.
    """
    present = [
        EXPECTED + metric
        for metric in expected
        if any(EXPECTED + metric in summary.figures for summary in summaries)
    ]
    errors = (
        [STANDARD_ERROR] if any(STANDARD_ERROR in summary.figures for summary in summaries) else []
    )
    return [*METRICS, *errors, *present]


def metric_title(metric: str) -> str:
    """hit@10 → Hit@10, ndcg@5 → NDCG@5, expected_ndcg@10 → expected NDCG@10."""
    if metric == STANDARD_ERROR:
        return "s.e. of NDCG@10"
    if metric.startswith(EXPECTED):
        return f"expected {metric_title(metric.removeprefix(EXPECTED))}"
    name, at, k = metric.partition("@")
    return {"ndcg": "NDCG", "hit": "Hit"}.get(name, name) + at + k


def print_table(
    rows: Sequence[Row],
    intervals: Sequence[Interval] = (),
    labels: Sequence[MethodLabel] = (),
    title: str = "Test split, full ranking",
    console: Console | None = None,
) -> None:
    """Print the results, a table per treatment of seen items; fits 80 columns.

    Shown are means over seeds with the sample standard deviation
    below them, each paired interval of the treatment as a sentence,
    and the number of users with nothing left to recommend.
    """
    console = console or Console()
    summaries = summarise_rows(rows, labels)
    for excluded in sorted({summary.exclude_seen for summary in summaries}, reverse=True):
        group = [summary for summary in summaries if summary.exclude_seen == excluded]
        users = max(summary.users for summary in group)
        console.print(_table(group, f"{title}, {seen_title(excluded)}, {users:,} users"))
        notes = [
            *(interval.sentence() for interval in intervals if interval.exclude_seen == excluded),
            without_items_note(group),
        ]
        for note in filter(None, notes):
            console.print(note, markup=False, highlight=False, soft_wrap=True)


def without_items_note(summaries: Sequence[Summary]) -> str:
    """The sentence on users with an empty list, "" where there is none."""
    most = max(summaries, key=lambda summary: summary.users_without_items, default=None)
    if most is None or most.users_without_items == 0:
        return ""
    return (
        f"{most.users_without_items:,} of {most.users:,} users have nothing left to recommend "
        "(every item is in their history); they count as misses"
    )


def best_mean(summaries: Sequence[Summary], metric: str) -> float | None:
    """The highest mean among what was learned or counted; bounds do not compete."""
    if metric == STANDARD_ERROR:
        return None
    means = [
        summary.figures[metric].mean
        for summary in summaries
        if not summary.label.is_bound and metric in summary.figures
    ]
    return max(means, default=None)


def _table(summaries: Sequence[Summary], title: str) -> Table:
    metrics = shown_metrics(summaries)
    seeds = any(len(summary.seeds) > 1 for summary in summaries)
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("method", overflow="fold")
    for metric in metrics:
        table.add_column(
            metric_title(metric).replace(" ", "\n"), justify="right", no_wrap=True, vertical="top"
        )
    if seeds:
        table.add_column("seeds", justify="right")
    for summary in summaries:
        cells = [_cell(summary, metric, best_mean(summaries, metric)) for metric in metrics]
        table.add_row(summary.method, *cells, *([str(len(summary.seeds))] if seeds else []))
    return table


def _cell(summary: Summary, metric: str, best: float | None) -> Text:
    figure = summary.figures.get(metric)
    if figure is None:
        return Text("–")
    style = "bold" if not summary.label.is_bound and figure.mean == best else ""
    return Text(figure.text().replace(" ± ", "\n±"), style=style)


def seen_title(exclude_seen: bool) -> str:
    return "items of the history excluded" if exclude_seen else "items of the history kept"


def _summary(label: MethodLabel, exclude_seen: bool, rows: Sequence[Row]) -> Summary:
    figures: dict[str, Figure] = {}
    expected = (EXPECTED + name for name in METRICS)
    for metric in (*METRICS, STANDARD_ERROR, *expected, *BEYOND_ACCURACY, *COST):
        values = [float(row[metric]) for row in rows if row.get(metric) is not None]
        if len(values) == len(rows):
            figures[metric] = Figure(
                statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
            )
    return Summary(
        label,
        exclude_seen,
        tuple(row["seed"] for row in rows),
        int(rows[0]["users"]),
        max(int(row.get("users_without_items", 0)) for row in rows),
        figures,
    )


def _checked(row: Row) -> dict[str, Any]:
    """The row with the required keys first,
    after the checks that a wrong row would fail.
    """
    required = ("method", *METRICS, "users", "seed", "exclude_seen")
    missing = [key for key in required if key not in row]
    if missing:
        raise ValueError(f"a results row of {row.get('method', '?')} lacks {missing}")
    for metric in METRICS:
        if not (math.isfinite(row[metric]) and 0.0 <= row[metric] <= 1.0):
            raise ValueError(f"{row['method']}: {metric} {row[metric]} is not a fraction")
    for k in (5, 10):
        if row[f"ndcg@{k}"] > row[f"hit@{k}"] + 1e-9:
            raise ValueError(
                f"{row['method']}: ndcg@{k} {row[f'ndcg@{k}']} is above hit@{k} {row[f'hit@{k}']}"
            )
    return {**{key: row[key] for key in required}, **row}


def _plain(value: Any) -> Any:
    """NumPy and torch scalars, paths and dataclasses of extras, as JSON has them."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
