"""report.html: a whole run on one page that opens anywhere, alone and offline.

Everything that came from data or configuration is escaped, and
the page's own policy forbids scripts and every foreign address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ilrec_dist.common.files import atomic_file
from ilrec_dist.reporting.analysis import analysis_section
from ilrec_dist.reporting.html import curves
from ilrec_dist.reporting.html.charts import Chart, line_chart
from ilrec_dist.reporting.html.curves import MethodMetrics
from ilrec_dist.reporting.html.examples import Example, examples_section
from ilrec_dist.reporting.html.facts import facts_table
from ilrec_dist.reporting.html.page import html_page
from ilrec_dist.reporting.html.results_table import (
    beyond_accuracy_section,
    cost_section,
    header_tiles,
    results_section,
)
from ilrec_dist.reporting.progress import clock
from ilrec_dist.reporting.results import MethodLabel, Summary, intervals_of, summarise_rows

REPORT_FILE = "report.html"


def write_report(
    run_dir: str | Path,
    *,
    name: str,
    results: Mapping[str, Any],
    metrics: Sequence[MethodMetrics],
    labels: Sequence[MethodLabel] = (),
    examples: Sequence[Example] = (),
    config_yaml: str = "",
    data_report: Mapping[str, Any] | None = None,
    index_report: Mapping[str, Any] | None = None,
    cf_report: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    analysis: Mapping[str, Any] | None = None,
) -> Path:
    """Write run_dir/report.html whole or not at all and return its path.

    `results` is what write_results returned; `labels` give the order and the emphasis
    of methods; `data_report`, `index_report` and `cf_report` are what the stages wrote
    about their work, and `warnings` stand at the top; `analysis` is what `ilrec
    analyze` found. Parts without material are left out.
    """
    summaries = summarise_rows(results["rows"], labels)
    intervals = intervals_of(results)
    order = {label.name: number for number, label in enumerate(labels)}
    runs = sorted(metrics, key=lambda run: order.get(run.method, len(order)))
    sections = [
        ("results", "Results", results_section(summaries, intervals)),
        ("beyond-accuracy", "Beyond accuracy", beyond_accuracy_section(summaries)),
        ("cost", "Cost of training", cost_section(summaries)),
        *((slug, title, _charts(make(runs))) for slug, title, make in _CURVES),
        ("why", "Why", analysis_section(analysis)),
        ("examples", "Examples", examples_section(examples)),
        ("times", "Time by stage", _stages(results["stage_seconds"], results["seconds"])),
        (
            "data",
            "Data, item index and collaborative model",
            _reports(data_report, index_report, cf_report),
        ),
        ("configuration", "Configuration", _configuration(config_yaml)),
    ]
    header = (
        f"<p>{_subtitle(results, summaries)}</p>"
        f"{_warnings(warnings)}{header_tiles(summaries, intervals, runs)}"
    )
    note = "Long curves are drawn as means over neighbouring steps."
    page = html_page(name, header, sections, note)
    path = Path(run_dir) / REPORT_FILE
    with atomic_file(path) as staged:
        staged.write_text(page, encoding="utf-8", errors="replace")
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
    dataset, split = escape(str(results["dataset"])), escape(str(results["split"]))
    return f"{dataset} · {split} split · {users:,} users · {clock(results['seconds'])} in all"


def _warnings(warnings: Sequence[str]) -> str:
    return "".join(f'<p class="warning">Warning: {escape(warning)}</p>' for warning in warnings)


def _stages(stage_seconds: Mapping[str, float], seconds: float) -> str:
    longest = max(stage_seconds.values(), default=0.0) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escape(stage)}</th><td class="meter">'
        f'<span style="width:{100 * value / longest:.1f}%"></span></td>'
        f"<td>{_seconds(value)}</td></tr>"
        for stage, value in stage_seconds.items()
    )
    total = (
        f'<tr><th scope="row">in all</th><td class="meter"></td><td>{_seconds(seconds)}</td></tr>'
    )
    head = (
        '<thead class="sr"><tr><th scope="col">stage</th><th scope="col">share</th>'
        '<th scope="col">time</th></tr></thead>'
    )
    return (
        f'<div class="card"><table class="stages">{head}<tbody>{rows}{total}</tbody></table></div>'
    )


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else clock(value)


def _reports(
    data_report: Mapping[str, Any] | None,
    index_report: Mapping[str, Any] | None,
    cf_report: Mapping[str, Any] | None,
) -> str:
    titles = (
        ("Data", data_report),
        ("Item index", index_report),
        ("Collaborative model", cf_report),
    )
    tables = [facts_table(title, report) for title, report in titles if report]
    charts = (
        _charts(curves.cf_charts(cf_report["models"]))
        if cf_report and "models" in cf_report
        else ""
    )
    return f'<div class="pair">{"".join(tables)}</div>{charts}' if tables else ""


def _configuration(config_yaml: str) -> str:
    return (
        '<details class="card"><summary>Resolved configuration</summary>'
        f"<pre>{escape(config_yaml)}</pre></details>"
        if config_yaml
        else ""
    )
