"""The results on the report's page: tiles, the table with its intervals, and bars."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ilrec_dist.reporting.html.charts import bar_chart
from ilrec_dist.reporting.html.curves import MethodMetrics
from ilrec_dist.reporting.results import (
    BEYOND_ACCURACY,
    COST,
    TRAINING_FLOPS,
    Figure,
    Interval,
    Summary,
    best_mean,
    metric_title,
    seen_title,
    shown_metrics,
    without_items_note,
)


def header_tiles(
    summaries: Sequence[Summary], intervals: Sequence[Interval], runs: Sequence[MethodMetrics]
) -> str:
    """The main figures of highlighted methods under the page's title."""
    tiles: list[tuple[str, str, str]] = []
    for summary in summaries:
        if summary.label.highlighted and summary.exclude_seen == summaries[0].exclude_seen:
            tiles += _method_tiles(summary, intervals, runs)
    if not tiles:
        return ""
    entries = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(figure)}<small>{escape(note)}</small></dd></div>"
        for title, figure, note in tiles
    )
    return f'<dl class="tiles">{entries}</dl>'


def _method_tiles(
    summary: Summary, intervals: Sequence[Interval], runs: Sequence[MethodMetrics]
) -> list[tuple[str, str, str]]:
    """(title, figure, note) of one method: quality,
    its first interval, ends of its curves.
    """
    ndcg = summary.figures["ndcg@10"]
    spread = "one seed" if ndcg.std is None else f"± {ndcg.std:.4f} over {len(summary.seeds)} seeds"
    tiles = [(f"{summary.label.title}, test NDCG@10", f"{ndcg.mean:.4f}", spread)]
    for interval in intervals:
        if (interval.method, interval.metric, interval.exclude_seen) == (
            summary.method,
            "ndcg@10",
            summary.exclude_seen,
        ):
            title = f"{summary.label.title} against {interval.versus}"
            tiles.append((title, f"{interval.difference:+.4f}", interval.range()))
            break
    figures = (
        ("negatives/mean", "Mean |H|", "negatives per row, end of training"),
        ("rewards/coverage", "Reward coverage", "end of training"),
    )
    for key, title, note in figures:
        values = [
            value
            for run in runs
            if run.method == summary.method and (value := run.last(key)) is not None
        ]
        if values:
            tiles.append((title, f"{sum(values) / len(values):.2f}", note))
    return tiles


def results_section(summaries: Sequence[Summary], intervals: Sequence[Interval]) -> str:
    """The table, a group of rows per treatment
    of seen items with its intervals, and bars.
    """
    if not summaries:
        return ""
    columns = shown_metrics(summaries, expected=("hit@10", "ndcg@10"))
    head = "".join(f'<th scope="col">{metric_title(metric)}</th>' for metric in columns)
    rows, notes = [], []
    for excluded in dict.fromkeys(summary.exclude_seen for summary in summaries):
        group = [summary for summary in summaries if summary.exclude_seen == excluded]
        title = seen_title(excluded)
        rows.append(
            f'<tr class="group"><th scope="rowgroup" colspan="{len(columns) + 3}">{title}</th></tr>'
        )
        rows += [_result_row(summary, columns, group) for summary in group]
        sentences = [
            *(interval.sentence() for interval in intervals if interval.exclude_seen == excluded),
            without_items_note(group),
        ]
        notes += [
            f'<p class="note">{title[0].upper() + title[1:]}: {escape(sentence)}</p>'
            for sentence in sentences
            if sentence
        ]
    caption = (
        "Full ranking over the catalogue; one relevant item per user. Mean ± sample standard "
        "deviation over seeds; the best in bold, bounds aside."
    )
    table = (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr>'
        f'<th scope="col">method</th>{head}<th scope="col">users</th><th scope="col">seeds</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    first = [summary for summary in summaries if summary.exclude_seen == summaries[0].exclude_seen]
    bars = (
        f"<h3>NDCG@10, {seen_title(first[0].exclude_seen)}</h3>"
        f'<div class="scroll">{bar_chart(first, "ndcg@10")}</div>'
    )
    return f'<div class="card">{table}{"".join(notes)}{bars}</div>'


def beyond_accuracy_section(summaries: Sequence[Summary]) -> str:
    """The table of measures beside accuracy, of the first treatment of seen items."""
    first = [summary for summary in summaries if summary.exclude_seen == summaries[0].exclude_seen]
    columns = [
        metric for metric in BEYOND_ACCURACY if any(metric in summary.figures for summary in first)
    ]
    if not columns:
        return ""
    head = "".join(f'<th scope="col">{BEYOND_ACCURACY[metric][0]}</th>' for metric in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(summary.method)}</th>'
        + "".join(f"<td>{_figure(summary.figures.get(metric))}</td>" for metric in columns)
        + "</tr>"
        for summary in first
    )
    notes = "".join(
        f"<li>{BEYOND_ACCURACY[metric][0]}: {escape(BEYOND_ACCURACY[metric][1])}</li>"
        for metric in columns
    )
    return (
        f'<div class="card"><div class="scroll"><table><caption>Lists of ten, '
        f"{seen_title(first[0].exclude_seen)}; mean over seeds.</caption><thead><tr>"
        f'<th scope="col">method</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<ul class="note">{notes}</ul></div>'
    )


def cost_section(summaries: Sequence[Summary]) -> str:
    """The table of what the trained methods cost, beside their quality."""
    first = [
        summary
        for summary in summaries
        if summary.exclude_seen == summaries[0].exclude_seen and TRAINING_FLOPS in summary.figures
    ]
    if not first:
        return ""
    title, meaning = COST[TRAINING_FLOPS]
    least = min(summary.figures[TRAINING_FLOPS].mean for summary in first)
    rows = "".join(
        f'<tr><th scope="row">{escape(summary.method)}</th>'
        f"<td>{_figure(summary.figures.get('ndcg@10'))}</td>"
        f"<td>{summary.figures[TRAINING_FLOPS].mean:.2e}</td>"
        f"<td>{summary.figures[TRAINING_FLOPS].mean / least:.2f} ×</td></tr>"
        for summary in first
    )
    return (
        f'<div class="card"><div class="scroll"><table><caption>{title}: {escape(meaning)}; mean '
        f'over seeds.</caption><thead><tr><th scope="col">method</th><th scope="col">NDCG@10</th>'
        f'<th scope="col">{title}</th><th scope="col">of the cheapest</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def _figure(figure: Figure | None) -> str:
    return "–" if figure is None else f"{figure.mean:.4f}"


def _result_row(summary: Summary, columns: Sequence[str], group: Sequence[Summary]) -> str:
    cells = []
    for metric in columns:
        figure = summary.figures.get(metric)
        if figure is None:
            cells.append("<td>–</td>")
            continue
        best = not summary.label.is_bound and figure.mean == best_mean(group, metric)
        spread = f"<small>± {figure.std:.4f}</small>" if figure.std is not None else ""
        cells.append(f"<td{' class=best' if best else ''}>{figure.mean:.4f}{spread}</td>")
    kind = ' class="highlighted"' if summary.label.highlighted else ""
    return (
        f'<tr{kind}><th scope="row">{escape(summary.method)}</th>{"".join(cells)}'
        f"<td>{summary.users:,}</td><td>{len(summary.seeds)}</td></tr>"
    )
