"""The results of a run: results.json for programs, and the table for people (METHOD.md §9)."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

RESULTS_FILE = "results.json"
METHODS = (
    "popularity",
    "transitions",
    "sasrec",
    "sft",
    "ilrec",
    "bayes",
)  # the order of every table
METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10")  # in every row
EXPECTED = "expected_"
STANDARD_ERROR = (
    "ndcg@10_se"  # over users  # prefix of a row's expected-rank figures, such as expected_ndcg@10
)

Row = Mapping[str, Any]


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
            f"paired {self.level:.0%} interval [{self.low:+.4f}, {self.high:+.4f}] over users"
        )


@dataclass(frozen=True)
class Figure:
    """A metric over the seeds of one method; `std` is the sample standard deviation, None for a single seed."""

    mean: float
    std: float | None

    def text(self) -> str:
        return f"{self.mean:.4f}" if self.std is None else f"{self.mean:.4f} ± {self.std:.4f}"


@dataclass(frozen=True)
class Summary:
    """One line of the table: a method under one treatment of seen items, over its seeds."""

    method: str
    exclude_seen: bool
    seeds: tuple[int, ...]
    users: int
    figures: Mapping[str, Figure]  # metric → figure; expected-rank ones under their prefixed key


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

    A row has method, the METRICS as fractions, users, seed (any value for methods that draw nothing) and exclude_seen; further keys stay
    (expected-rank figures as `expected_ndcg@10`, say). `seconds` is the sum of `stage_seconds`, each stage's wall time. `extras` are
    further top-level keys; intervals go under `paired_bootstrap`. Raises ValueError for a row that cannot be right.
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
    results = json.loads(json.dumps({**fixed, **(extras or {})}, allow_nan=False, default=_plain))
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return results


def intervals_of(results: Mapping[str, Any]) -> list[Interval]:
    """The paired bootstrap intervals of a results dict."""
    return [Interval(**entry) for entry in results.get("paired_bootstrap", [])]


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Rows over seeds → one Summary per method and treatment of seen items: seen excluded first, methods in the order of METHODS."""
    groups: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((bool(row["exclude_seen"]), row["method"]), []).append(row)
    known = {method: place for place, method in enumerate(METHODS)}
    ordered = sorted(groups, key=lambda key: (not key[0], known.get(key[1], len(known)), key[1]))
    return [_summary(method, excluded, groups[excluded, method]) for excluded, method in ordered]


def shown_metrics(
    summaries: Sequence[Summary], expected: Sequence[str] = ("ndcg@10",)
) -> list[str]:
    """The table's columns: the METRICS, then the expected-rank figures of the metrics `expected` as far as there are any."""
    given = [
        EXPECTED + metric
        for metric in expected
        if any(EXPECTED + metric in summary.figures for summary in summaries)
    ]
    errors = (
        [STANDARD_ERROR] if any(STANDARD_ERROR in summary.figures for summary in summaries) else []
    )
    return [*METRICS, *errors, *given]


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
    title: str = "Test split, full ranking",
    console: Console | None = None,
) -> None:
    """The results in the terminal, a table per treatment of seen items: means over seeds, the sample standard deviation below them, and each
    paired interval as a sentence. Fits 80 columns."""
    console = console or Console()
    summaries = summarise(rows)
    for excluded in sorted({summary.exclude_seen for summary in summaries}, reverse=True):
        group = [summary for summary in summaries if summary.exclude_seen == excluded]
        console.print(
            _table(
                group,
                f"{title}, {seen_title(excluded)}, {max(summary.users for summary in group):,} users",
            )
        )
        for interval in intervals:
            if interval.exclude_seen == excluded:
                console.print(interval.sentence(), markup=False, highlight=False, soft_wrap=True)


def best_mean(summaries: Sequence[Summary], metric: str) -> float | None:
    """The highest mean among what was learned or counted; bayes knows the truth and does not compete."""
    if metric == STANDARD_ERROR:
        return None
    means = [
        summary.figures[metric].mean
        for summary in summaries
        if summary.method != "bayes" and metric in summary.figures
    ]
    return max(means, default=None)


def _table(summaries: Sequence[Summary], title: str) -> Table:
    metrics = shown_metrics(summaries)
    seeds = any(len(summary.seeds) > 1 for summary in summaries)
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("method", no_wrap=True)
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
    style = "bold" if summary.method != "bayes" and figure.mean == best else ""
    return Text(figure.text().replace(" ± ", "\n±"), style=style)


def seen_title(exclude_seen: bool) -> str:
    return "items of the history excluded" if exclude_seen else "items of the history kept"


def _summary(method: str, exclude_seen: bool, rows: Sequence[Row]) -> Summary:
    figures: dict[str, Figure] = {}
    for metric in (*METRICS, STANDARD_ERROR, *(EXPECTED + name for name in METRICS)):
        values = [float(row[metric]) for row in rows if row.get(metric) is not None]
        if len(values) == len(rows):
            figures[metric] = Figure(
                statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
            )
    return Summary(
        method, exclude_seen, tuple(row["seed"] for row in rows), int(rows[0]["users"]), figures
    )


def _checked(row: Row) -> dict[str, Any]:
    """The row with the required keys first, after the checks that a wrong row would fail."""
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
