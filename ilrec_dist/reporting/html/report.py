"""report.html: a whole run on one page that opens anywhere, alone and offline.

Everything that came from data or configuration is escaped, and the page's own policy forbids scripts and every foreign address.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ilrec_dist import __version__
from ilrec_dist.reporting.html import curves
from ilrec_dist.reporting.html.charts import Chart, bar_chart, format_number, line_chart
from ilrec_dist.reporting.html.curves import MethodMetrics
from ilrec_dist.reporting.html.style import CSS
from ilrec_dist.reporting.progress import clock
from ilrec_dist.reporting.results import (
    Interval,
    Summary,
    best_mean,
    intervals_of,
    metric_title,
    seen_title,
    shown_metrics,
    summarise,
)

REPORT_FILE = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SHOWN_HISTORY, SHOWN_BEAMS, SHOWN_VALUES, SHOWN_ENTRIES = 20, 10, 12, 8

Beams = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Example:
    """One user for the report. Titles are shown as they are; one that names two items should carry the item id, as a beam equal to the
    target's title counts as the hit. `methods`: name → beams (title, Σ log p), best first."""

    user: str
    history: Sequence[str]  # oldest first
    target: str
    methods: Mapping[str, Beams]


def write_report(
    run_dir: str | Path,
    *,
    name: str,
    results: Mapping[str, Any],
    metrics: Sequence[MethodMetrics],
    examples: Sequence[Example] = (),
    config_yaml: str = "",
    index_report: Mapping[str, Any] | None = None,
    cf_report: Mapping[str, Any] | None = None,
) -> Path:
    """Write run_dir/report.html whole or not at all and return its path. `results` is what write_results returned; parts without
    material are left out."""
    summaries = summarise(results["rows"])
    intervals = intervals_of(results)
    sections = [
        ("results", "Results", _results(summaries, intervals)),
        *((slug, title, _charts(make(metrics))) for slug, title, make in _CURVES),
        ("examples", "Examples", _examples(examples)),
        ("times", "Time by stage", _stages(results["stage_seconds"], results["seconds"])),
        ("data", "Item index and collaborative model", _reports(index_report, cf_report)),
        ("configuration", "Configuration", _configuration(config_yaml)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{slug}">{escape(title)}</a>' for slug, title, _ in shown)
    body = "".join(
        f'<section aria-labelledby="{slug}"><h2 id="{slug}">{escape(title)}</h2>{html}</section>'
        for slug, title, html in shown
    )
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · ILRec-dist</title><style>{CSS}</style></head><body><main>"
        f"<header><h1>{escape(name)}</h1><p>{_subtitle(results, summaries)}</p>{_tiles(results, summaries, intervals, metrics)}"
        f'<nav aria-label="Sections">{links}</nav></header>{body}'
        f"<footer>Written by ILRec-dist {escape(__version__)}. Long curves are drawn as means over neighbouring steps.</footer>"
        "</main></body></html>\n"
    )
    path = Path(run_dir) / REPORT_FILE
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path


_CURVES: tuple[tuple[str, str, Callable[[Sequence[MethodMetrics]], list[Chart]]], ...] = (
    ("validation", "Validation during training", curves.validation_charts),
    ("losses", "Losses", curves.loss_charts),
    ("losses-by-position", "Losses by position in the item", curves.loss_position_charts),
    ("negatives", "Self-hard negatives by position in the item", curves.negative_charts),
    ("layers", "Layers, rewards and the target's probability", curves.signal_charts),
    ("speed", "Speed and optimisation", curves.speed_charts),
)


def _charts(charts: Sequence[Chart]) -> str:
    return (
        f'<div class="grid">{"".join(line_chart(chart) for chart in charts)}</div>'
        if charts
        else ""
    )


def _subtitle(results: Mapping[str, Any], summaries: Sequence[Summary]) -> str:
    users = max((summary.users for summary in summaries), default=0)
    return f"{escape(str(results['dataset']))} · {escape(str(results['split']))} split · {users:,} users · {clock(results['seconds'])} in all"


def _tiles(
    results: Mapping[str, Any],
    summaries: Sequence[Summary],
    intervals: Sequence[Interval],
    metrics: Sequence[MethodMetrics],
) -> str:
    tiles: list[tuple[str, str, str]] = []
    for summary in summaries:
        if summary.method == "ilrec" and summary.exclude_seen == summaries[0].exclude_seen:
            figure = summary.figures["ndcg@10"]
            spread = (
                "one seed"
                if figure.std is None
                else f"± {figure.std:.4f} over {len(summary.seeds)} seeds"
            )
            tiles.append(("ILRec, test NDCG@10", f"{figure.mean:.4f}", spread))
    for interval in intervals:
        if (interval.method, interval.versus, interval.metric) == ("ilrec", "sft", "ndcg@10"):
            tiles.append(
                (
                    "against SFT",
                    f"{interval.difference:+.4f}",
                    f"paired {interval.level:.0%} interval [{interval.low:+.4f}, {interval.high:+.4f}]",
                )
            )
            break
    figures = (
        ("negatives/mean", "Mean |H|", "negatives per row, end of training"),
        ("rewards/coverage", "Reward coverage", "end of training"),
    )
    for key, title, note in figures:
        values = [
            value
            for run in metrics
            if run.method == "ilrec" and (value := run.last(key)) is not None
        ]
        if values:
            tiles.append((title, f"{sum(values) / len(values):.2f}", note))
    if not tiles:
        return ""
    return (
        '<dl class="tiles">'
        + "".join(
            f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>"
            for a, b, c in tiles
        )
        + "</dl>"
    )


def _results(summaries: Sequence[Summary], intervals: Sequence[Interval]) -> str:
    if not summaries:
        return ""
    columns = shown_metrics(summaries, expected=("hit@10", "ndcg@10"))
    head = "".join(f'<th scope="col">{metric_title(metric)}</th>' for metric in columns)
    rows = []
    for place, summary in enumerate(summaries):
        if place == 0 or summary.exclude_seen != summaries[place - 1].exclude_seen:
            rows.append(
                f'<tr class="group"><th scope="rowgroup" colspan="{len(columns) + 3}">{seen_title(summary.exclude_seen)}</th></tr>'
            )
        rows.append(
            _result_row(
                summary,
                columns,
                [other for other in summaries if other.exclude_seen == summary.exclude_seen],
            )
        )
    caption = "Full ranking over the catalogue; one relevant item per user. Mean ± sample standard deviation over seeds; the best but for bayes in bold."
    table = (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th scope="col">method</th>{head}'
        f'<th scope="col">users</th><th scope="col">seeds</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    sentences = "".join(
        f'<p class="note">{escape(interval.sentence())}</p>' for interval in intervals
    )
    first = [summary for summary in summaries if summary.exclude_seen == summaries[0].exclude_seen]
    bars = f'<h3>NDCG@10, {seen_title(first[0].exclude_seen)}</h3><div class="scroll">{bar_chart(first, "ndcg@10")}</div>'
    return f'<div class="card">{table}{sentences}{bars}</div>'


def _result_row(summary: Summary, columns: Sequence[str], rivals: Sequence[Summary]) -> str:
    cells = []
    for metric in columns:
        figure = summary.figures.get(metric)
        best = (
            figure is not None
            and summary.method != "bayes"
            and figure.mean == best_mean(rivals, metric)
        )
        spread = f"<small>± {figure.std:.4f}</small>" if figure and figure.std is not None else ""
        cells.append(
            f"<td{' class=best' if best else ''}>{f'{figure.mean:.4f}' if figure else '–'}{spread}</td>"
        )
    kind = ' class="ours"' if summary.method == "ilrec" else ""
    return f'<tr{kind}><th scope="row">{escape(summary.method)}</th>{"".join(cells)}<td>{summary.users:,}</td><td>{len(summary.seeds)}</td></tr>'


def _examples(examples: Sequence[Example]) -> str:
    note = '<p class="note">Users of the test split with the first beams of each model; the figure on the right is Σ log p of the item.</p>'
    return note + "".join(_example(example) for example in examples) if examples else ""


def _example(example: Example) -> str:
    earlier = len(example.history) - SHOWN_HISTORY
    chips = "".join(f"<li>{escape(title)}</li>" for title in example.history[-SHOWN_HISTORY:])
    more = f"<li>… {earlier} earlier</li>" if earlier > 0 else ""
    methods = "".join(
        _beams(name, beams, example.target) for name, beams in example.methods.items()
    )
    return (
        f'<article class="card example"><h3>User {escape(example.user)}</h3>'
        f'<p class="label">History, oldest first</p><ol class="chips">{more}{chips}</ol>'
        f'<p class="label">Target</p><ul class="chips"><li class="target">{escape(example.target)}</li></ul>'
        f'<div class="beams">{methods}</div></article>'
    )


def _beams(name: str, beams: Beams, target: str) -> str:
    rows = []
    for place, (title, score) in enumerate(beams[:SHOWN_BEAMS], start=1):
        hit = title == target
        mark = '<span class="mark">✓ hit</span>' if hit else ""
        rows.append(
            f"<tr{' class=hit' if hit else ''}><td>{place}</td><td>{escape(title)}{mark}</td><td>{_signed(score)}</td></tr>"
        )
    head = '<thead class="sr"><tr><th scope="col">rank</th><th scope="col">item</th><th scope="col">log p</th></tr></thead>'
    rank = next((place for place, (title, _) in enumerate(beams, start=1) if title == target), None)
    found = f"target at rank {rank}" if rank else f"target not among the {len(beams)} beams"
    return f'<div><h4>{escape(name)} <span class="note">{found}</span></h4><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _signed(score: float) -> str:
    return f"{score:.2f}".replace("-", "−")


def _stages(stage_seconds: Mapping[str, float], seconds: float) -> str:
    longest = max(stage_seconds.values(), default=0.0) or 1.0
    meters = {
        stage: f'<td class="meter"><span style="width:{100 * value / longest:.1f}%"></span></td>'
        for stage, value in stage_seconds.items()
    }
    rows = "".join(
        f'<tr><th scope="row">{escape(stage)}</th>{meters[stage]}<td>{_seconds(value)}</td></tr>'
        for stage, value in stage_seconds.items()
    )
    total = (
        f'<tr><th scope="row">in all</th><td class="meter"></td><td>{_seconds(seconds)}</td></tr>'
    )
    head = '<thead class="sr"><tr><th scope="col">stage</th><th scope="col">share</th><th scope="col">time</th></tr></thead>'
    return (
        f'<div class="card"><table class="stages">{head}<tbody>{rows}{total}</tbody></table></div>'
    )


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else clock(value)


def _reports(index_report: Mapping[str, Any] | None, cf_report: Mapping[str, Any] | None) -> str:
    tables = [
        _facts(title, report)
        for title, report in (("Item index", index_report), ("Collaborative model", cf_report))
        if report
    ]
    charts = (
        _charts(curves.cf_charts(cf_report["models"]))
        if cf_report and "models" in cf_report
        else ""
    )
    return f'<div class="pair">{"".join(tables)}</div>{charts}' if tables else ""


def _facts(title: str, report: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in _flat(report)
    )
    return f'<div class="card"><table class="facts"><caption>{escape(title)}</caption><tbody>{rows}</tbody></table></div>'


def _flat(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in report.items():
        label = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{label} · ")
        elif (
            isinstance(value, list | tuple)
            and len(value) <= SHOWN_ENTRIES
            and all(isinstance(entry, Mapping) for entry in value)
        ):
            for place, entry in enumerate(value, start=1):
                yield f"{label} {place}", ", ".join(f"{name} {text}" for name, text in _flat(entry))
        elif isinstance(value, list | tuple) and any(
            isinstance(entry, Mapping | list | tuple) for entry in value
        ):
            yield label, f"{len(value)} entries"
        elif isinstance(value, list | tuple):
            yield (
                label,
                ", ".join(_text(entry) for entry in value[:SHOWN_VALUES])
                + (f", … ({len(value)} values)" if len(value) > SHOWN_VALUES else ""),
            )
        else:
            yield label, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return format_number(value) if isinstance(value, int | float) else str(value)


def _configuration(config_yaml: str) -> str:
    return (
        f'<details class="card"><summary>Resolved configuration</summary><pre>{escape(config_yaml)}</pre></details>'
        if config_yaml
        else ""
    )
