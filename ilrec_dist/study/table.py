"""The study's table as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import write_text
from ilrec_dist.reporting.progress import clock
from ilrec_dist.reporting.results import BEYOND_ACCURACY, Figure, Interval, metric_title, seen_title
from ilrec_dist.study.figures import CellFigures, Row, StudyFigures
from ilrec_dist.study.hours import Hours

METRICS = ("hit@5", "hit@10", "ndcg@5", "ndcg@10")
COMPARED = "ndcg@10"


def markdown(figures: StudyFigures) -> str:
    """The tables of every configuration, what validation chose, and what is missing."""
    parts = [origin(figures)]
    several = len(figures.study.configurations) > 1
    for configuration in figures.study.configurations:
        rows = [row for row in figures.rows if row.configuration == configuration]
        if several:
            parts.append(f"### {configuration}")
        if not rows:
            parts.append("No cell is finished.")
        for number, excluded in enumerate(dict.fromkeys(row.summary.exclude_seen for row in rows)):
            group = [row for row in rows if row.summary.exclude_seen == excluded]
            users = max(row.summary.users for row in group)
            title = seen_title(excluded)
            parts.append(f"{title[0].upper()}{title[1:]}, {users:,} users:")
            # What a training cost is the same under both treatments.
            parts.append(_table(group, with_costs=number == 0))
    parts += [hours.sentence() for hours in figures.hours]
    if figures.choices:
        parts.append("Chosen on validation, without a look at the test split:")
        parts.append("\n".join(f"- {choice.sentence()}" for choice in figures.choices))
    missing = figures.missing()
    if missing:
        parts.append(f"Missing are {len(missing)} of {len(figures.cells)} cells:")
        parts.append(
            "\n".join(f"- {result.cell.title}: {result.missing_reason()}" for result in missing)
        )
    return "\n\n".join(parts) + "\n"


def origin(figures: StudyFigures) -> str:
    """Where the figures come from: commits, machines, seeds."""
    done = [result for result in figures.cells if result.is_done]
    if not done:
        return f"Study `{figures.study.name}`: no cell is finished."
    commits = sorted({result.state.commit for result in done if result.state})
    machines = sorted({result.state.machine for result in done if result.state})
    return (
        f"Study `{figures.study.name}`, {len(done)} of {len(figures.cells)} cells; commit "
        f"{', '.join(commits)}; {'; '.join(machines)}. Test split, full ranking; mean ± standard "
        "deviation over seeds; differences with paired 95 % intervals over users, each user's "
        "value the mean over seeds. FLOPs, time and memory are those of one training: FLOPs with "
        "those of the training that it starts from, time with its validations, memory of its "
        "largest worker."
    )


def table_columns(
    rows: Sequence[Row], with_costs: bool, number: Callable[[Figure | None], str]
) -> list[tuple[str, list[str]]]:
    """(title, a text for each row) of the columns
    after the rows' names that are not empty.

    `number` writes a metric.
    """
    against = dict.fromkeys(interval.versus for row in rows for interval in row.intervals)
    columns = {"seeds": [str(len(row.cells)) if row.cells else "" for row in rows]}
    if with_costs:
        columns["validation NDCG@10"] = [number(row.validation()) for row in rows]
    for metric in METRICS:
        columns[metric_title(metric)] = [number(row.summary.figures.get(metric)) for row in rows]
    for name in against:
        title = f"{metric_title(COMPARED)} − {name}"
        columns[title] = [interval_text(interval_of(row, name)) for row in rows]
    if with_costs:
        columns["FLOPs"] = [flops_text(row.flops()) for row in rows]
        columns["time"] = [time_text(row.seconds()) for row in rows]
        columns["memory"] = [memory_text(row.peak_memory()) for row in rows]
    return [(title, texts) for title, texts in columns.items() if any(texts)]


def _table(rows: Sequence[Row], with_costs: bool) -> str:
    columns = table_columns(rows, with_costs, _metric)
    head = ["row", *(title for title, _ in columns)]
    lines = [_line(head), _line("---" for _ in head)]
    lines += [
        _line([row.name, *(texts[number] for _, texts in columns)])
        for number, row in enumerate(rows)
    ]
    return "\n".join(lines)


def _line(cells: Iterator[str] | Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _metric(figure: Figure | None) -> str:
    if figure is None:
        return ""
    mean = f"{figure.mean:.4f}".lstrip("0")
    return mean if figure.std is None else f"{mean} ± {figure.std:.4f}".replace("± 0", "± ")


def interval_of(row: Row, versus: str, metric: str = COMPARED) -> Interval | None:
    for interval in row.intervals:
        if interval.versus == versus and interval.metric == metric:
            return interval
    return None


def interval_text(interval: Interval | None) -> str:
    if interval is None:
        return ""
    values = (interval.difference, interval.low, interval.high)
    difference, low, high = (f"{value:+.4f}".replace("0.", ".", 1) for value in values)
    return f"{difference} [{low}, {high}]"


def flops_text(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.mean:.2e}".replace("e+", "e")


def time_text(figure: Figure | None) -> str:
    return "" if figure is None else clock(figure.mean)


def memory_text(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.mean / 2**30:.2f} GiB"


def write_csv(figures: StudyFigures, path: Path) -> None:
    """One line a row and treatment of seen items, with every
    measure, then one for each unit of hours.
    """
    records = [
        *_records(figures),
        *({"row": "all cells", **_hours_record(hours)} for hours in figures.hours),
    ]
    columns = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


def _records(figures: StudyFigures) -> Iterator[dict[str, Any]]:
    chosen = {(choice.configuration, choice.chosen) for choice in figures.choices}
    for row in figures.rows:
        summary = row.summary
        record: dict[str, Any] = {
            "configuration": row.configuration,
            "row": row.name,
            "exclude_seen": summary.exclude_seen,
            "users": summary.users,
            "seeds": " ".join(str(result.cell.seed) for result in row.cells),
            "chosen_on_validation": (row.configuration, row.name) in chosen,
        }
        measures = {
            "validation_ndcg@10": row.validation(),
            **summary.figures,
            "training_seconds": row.seconds(),
            "peak_memory_bytes": row.peak_memory(),
        }
        for name, figure in measures.items():
            record[name] = "" if figure is None else figure.mean
            record[f"{name}_std"] = "" if figure is None or figure.std is None else figure.std
        for interval in row.intervals:
            prefix = f"{interval.metric} - {interval.versus}"
            record |= {
                prefix: interval.difference,
                f"{prefix} low": interval.low,
                f"{prefix} high": interval.high,
            }
        yield record


def _hours_record(hours: Hours) -> dict[str, Any]:
    return {
        "hours_of": hours.unit,
        "cells": hours.cells,
        "training_hours": hours.training,
        "evaluation_hours": hours.evaluation,
        "estimated_cells": hours.estimated_cells,
        "estimated_hours": hours.estimated,
        "hours_of_estimated_cells": hours.of_estimated,
    }


def as_json(figures: StudyFigures) -> dict[str, Any]:
    """Everything: the rows, the cells with what was looked at, and the choices."""
    return {
        "study": figures.study.name,
        "rows": list(_records(figures)),
        "hours": [_hours_record(hours) for hours in figures.hours],
        "cells": [_cell_record(result) for result in figures.cells],
        "choices": [
            asdict(choice) | {"rule": "the highest mean validation NDCG@10 over these seeds"}
            for choice in figures.choices
        ],
        "beyond_accuracy": {name: what for name, (_, what) in BEYOND_ACCURACY.items()},
    }


def _cell_record(result: CellFigures) -> dict[str, Any]:
    cell = result.cell
    record: dict[str, Any] = {
        "cell": cell.title,
        "configuration": cell.configuration,
        "method": cell.method,
        "setting": cell.setting,
        "seed": cell.seed,
        "folder": str(cell.folder),
        "done": result.is_done,
    }
    if not result.is_done:
        return record | {"missing": result.missing_reason()}
    assert result.state is not None
    return record | {
        "validation_ndcg@10": result.validation,
        "best_step": result.best_step,
        "validations": [{"epoch": epoch, "ndcg@10": value} for epoch, value in result.curve],
        "training_seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "commit": result.state.commit,
        "machine": result.state.machine,
    }


def write_into(path: Path, name: str, text: str) -> None:
    """Put the text into a Markdown file, between the marks of the study of that name.

    Raises UserError where there is no such file, or it has no such marks.
    """
    before, after = around_table(path, name)
    begin, end = _marks(name)
    write_text(path, f"{before}{begin}\n\n{text}\n{end}{after}")


def around_table(path: Path, name: str) -> tuple[str, str]:
    """What stands before and after a study's table in a Markdown file.

    Raises UserError where there is no such file, or no place for that study in it.
    """
    try:
        page = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--into {path}: cannot be read ({error}); name a Markdown file") from None
    begin, end = _marks(name)
    before, mark, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    if not (mark and last):
        raise UserError(
            f"--into {path}: no place for the table of study {name}; write the lines {begin} and "
            f"{end} where it is to stand, or leave --into out"
        )
    return before, after


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- study {name} -->", f"<!-- end of study {name} -->"
