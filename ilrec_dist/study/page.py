"""The study's report.html: its tables, and plots of quality, cost and validation."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ilrec_dist.common.files import write_text
from ilrec_dist.reporting.html.charts import Chart, Series, bar_chart, line_chart
from ilrec_dist.reporting.html.page import Section, html_page
from ilrec_dist.reporting.html.results_table import beyond_accuracy_section
from ilrec_dist.reporting.results import Figure, metric_title, seen_title
from ilrec_dist.study.figures import Row, StudyFigures
from ilrec_dist.study.table import COMPARED, origin, table_columns

# Of the bars of training FLOPs.
PETA = 1e15
FLOPS_TITLE = "PFLOPs of a training"


def write_page(figures: StudyFigures, path: Path) -> None:
    """Write the page whole or not at all."""
    sections: list[Section] = []
    for configuration in figures.study.configurations:
        rows = [row for row in figures.rows if row.configuration == configuration]
        if rows:
            sections += _configuration_sections(configuration, rows)
    choices = "".join(f"<li>{escape(choice.sentence())}</li>" for choice in figures.choices)
    if choices:
        sections.append(("choices", "Chosen on validation", _card(f"<ul>{choices}</ul>")))
    missing = "".join(
        f"<li>{escape(result.cell.title)}: {escape(result.missing_reason())}</li>"
        for result in figures.missing()
    )
    if missing:
        sections.append(("missing", "Missing cells", _card(f"<ul>{missing}</ul>")))
    sentences = [origin(figures), *(hours.sentence() for hours in figures.hours)]
    header = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    write_text(path, html_page(figures.study.name, header, sections))


def _configuration_sections(name: str, rows: Sequence[Row]) -> list[Section]:
    by_treatment: dict[bool, list[Row]] = {}
    for row in rows:
        by_treatment.setdefault(row.summary.exclude_seen, []).append(row)
    tables = "".join(
        _table(group, with_costs=number == 0) for number, group in enumerate(by_treatment.values())
    )
    first = next(iter(by_treatment.values()))
    summaries = [row.summary for row in first]
    flops = [
        dataclasses.replace(
            row.summary,
            figures={FLOPS_TITLE: Figure(figure.mean / PETA, None)},
        )
        for row in first
        if (figure := row.flops()) is not None
    ]
    title = metric_title(COMPARED)
    plots = (
        f"<h3>{title}, {seen_title(summaries[0].exclude_seen)}</h3>"
        f'<div class="scroll">{bar_chart(summaries, COMPARED)}</div>'
        f'<h3>{FLOPS_TITLE}</h3><div class="scroll">{bar_chart(flops, FLOPS_TITLE)}</div>'
        f'<div class="grid">{line_chart(_validation_chart(first))}</div>'
    )
    slug = escape(name, quote=True)
    return [
        (slug, name, _card(tables)),
        (f"{slug}-plots", f"{name}: plots", _card(plots)),
        (f"{slug}-beyond", f"{name}: beyond accuracy", beyond_accuracy_section(summaries)),
    ]


def _table(rows: Sequence[Row], with_costs: bool) -> str:
    columns = table_columns(rows, with_costs, _figure)
    lines = []
    for number, row in enumerate(rows):
        kind = ' class="highlighted"' if row.summary.label.highlighted else ""
        body = "".join(f"<td>{texts[number]}</td>" for _, texts in columns)
        lines.append(f'<tr{kind}><th scope="row">{escape(row.name)}</th>{body}</tr>')
    users = max(row.summary.users for row in rows)
    caption = f"{seen_title(rows[0].summary.exclude_seen)}, {users:,} users"
    titles = ["row", *(title for title, _ in columns)]
    heads = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    return (
        f'<div class="scroll"><table><caption>{caption[0].upper()}{caption[1:]}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return ""
    spread = "" if figure.std is None else f"<small>± {figure.std:.4f}</small>"
    return f"{figure.mean:.4f}{spread}"


def _validation_chart(rows: Sequence[Row]) -> Chart:
    """NDCG@10 of the validations by epoch, a curve a row: the mean over its seeds."""
    series = []
    for number, row in enumerate(row for row in rows if row.cells):
        values: dict[float, list[float]] = {}
        for result in row.cells:
            for epoch, value in result.curve:
                values.setdefault(epoch, []).append(value)
        points = [(epoch, statistics.fmean(of_epoch)) for epoch, of_epoch in sorted(values.items())]
        series.append(Series(row.name, points, number % 8, number // 8))
    return Chart("Validation NDCG@10", series, "means over seeds", "epoch", marks=True)


def _card(html: str) -> str:
    return f'<div class="card">{html}</div>'
