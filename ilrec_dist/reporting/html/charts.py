"""Line and bar charts as inline SVG, with
titles under the pointer and without a script.

Colours are the classes c0 … c7 and dashes the classes d0 … d3
of style.py, so one chart serves the light and the dark page.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ilrec_dist.reporting.results import Summary, metric_title

COLOURS, DASHES = 8, 4
# Points that a curve is drawn with; more lines of the log are averaged into them.
MAX_BINS = 90
WIDTH, HEIGHT = 292.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 42.0, 10.0, 8.0, 36.0


@dataclass(frozen=True)
class Series:
    """One curve: points (x, y) in ascending x, finite."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Chart:
    title: str
    series: Sequence[Series]
    note: str = ""
    x_label: str = "step"
    # y is a share, so the axis ends at 0 and at most at 1.
    share: bool = False
    # Every point gets a dot.
    marks: bool = False


@dataclass(frozen=True)
class _Scale:
    """A linear map of [low, high] to the pixels [start, stop]."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return round(
            self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start), 2
        )


def line_chart(chart: Chart) -> str:
    """The chart as an HTML <figure>.

    Curves with more points than MAX_BINS are drawn as means over bins of x.
    """
    columns = _columns(chart.series)
    values = [y for _, row in columns for y in row if y is not None]
    if not values:
        return ""
    x = (
        _Scale(columns[0][0], columns[-1][0], LEFT, WIDTH - RIGHT)
        if len(columns) > 1
        else _Scale(columns[0][0] - 1, columns[0][0] + 1, LEFT, WIDTH - RIGHT)
    )
    low, high = _limits(values, chart.share)
    y = _Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y, chart.x_label)]
    for number, series in enumerate(chart.series):
        points = [(x(at), y(value)) for at, row in columns if (value := row[number]) is not None]
        style = _style(series)
        path = " ".join(f"{px:g},{py:g}" for px, py in points)
        parts.append(f'<polyline class="line {style}" points="{path}"/>')
        if chart.marks or len(points) == 1:
            parts += [
                f'<circle class="dot {style}" cx="{px:g}" cy="{py:g}" r="2.6"/>'
                for px, py in points
            ]
    parts.append(_bands(chart, columns, x))
    svg = _svg("chart-lines", WIDTH, HEIGHT, _spoken(chart), parts)
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>'
        f"{svg}{_legend(chart.series)}{note}</figure>"
    )


def _svg(css_class: str, width: float, height: float, spoken: str, parts: Sequence[str]) -> str:
    """The parts as a picture; `spoken` describes it to those who cannot see it."""
    return (
        f'<svg class="{css_class}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(spoken, quote=True)}">{"".join(parts)}</svg>'
    )


def bar_chart(summaries: Sequence[Summary], metric: str) -> str:
    """One horizontal bar per method with its value.

    A whisker shows one standard deviation where there are seeds.
    """
    shown = [summary for summary in summaries if metric in summary.figures]
    if not shown:
        return ""
    largest = (
        max(
            summary.figures[metric].mean + (summary.figures[metric].std or 0.0) for summary in shown
        )
        or 1.0
    )
    # Room for the longest name, at about 7 pixels a letter.
    left = max(92.0, 20.0 + 7.0 * max(len(summary.method) for summary in shown))
    row, width = 30.0, 548.0 + left
    x = _Scale(0.0, largest, left, width - 150.0)
    parts = []
    for number, summary in enumerate(shown):
        figure = summary.figures[metric]
        middle = number * row + row / 2
        parts.append(
            f'<text class="name" x="{left - 10:g}" y="{middle + 4:g}" text-anchor="end">'
            f"{escape(summary.method)}</text>"
        )
        label = summary.label
        kind = "bar highlighted" if label.highlighted else "bar bound" if label.is_bound else "bar"
        parts.append(
            f'<rect class="{kind}" x="{left:g}" y="{middle - 9:g}" '
            f'width="{max(1.0, x(figure.mean) - left):g}" height="18" rx="3"/>'
        )
        end = figure.mean
        if figure.std:
            end += figure.std
            parts.append(
                f'<path class="whisker" d="M{x(figure.mean - figure.std):g} {middle:g}'
                f'H{x(end):g}"/>'
            )
        parts.append(
            f'<text class="value" x="{x(end) + 8:g}" y="{middle + 4:g}">{figure.text()}</text>'
        )
    spoken = f"{metric_title(metric)}: " + ", ".join(
        f"{summary.method} {summary.figures[metric].text()}" for summary in shown
    )
    return _svg("bars", width, row * len(shown), spoken, parts)


def format_number(value: float) -> str:
    """Four significant digits, thousands with
    separators, no exponent between 1e-4 and 1e7.
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        return f"{value:.3g}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _columns(series: Sequence[Series]) -> list[tuple[float, list[float | None]]]:
    """One grid of x for all curves: [(x, [y or
    None for each curve])], at most MAX_BINS long.
    """
    xs = sorted({x for curve in series for x, _ in curve.points})
    if not xs:
        return []
    if len(xs) <= MAX_BINS:
        tables = [dict(curve.points) for curve in series]
        return [(x, [table.get(x) for table in tables]) for x in xs]
    width = (xs[-1] - xs[0]) / MAX_BINS
    edges = [xs[0] + width * (bin + 1) for bin in range(MAX_BINS - 1)]
    centres = [xs[0] + width * (bin + 0.5) for bin in range(MAX_BINS)]
    centres[0], centres[-1] = xs[0], xs[-1]
    sums = [[[0.0, 0] for _ in series] for _ in centres]
    for number, curve in enumerate(series):
        for x, y in curve.points:
            cell = sums[bisect.bisect_right(edges, x)][number]
            cell[0] += y
            cell[1] += 1
    columns = [
        (x, [total / count if count else None for total, count in row])
        for x, row in zip(centres, sums, strict=True)
    ]
    return [column for column in columns if any(y is not None for y in column[1])]


def _limits(values: Sequence[float], share: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if share or 0 <= low < 0.4 * high:
        low = 0.0
    # Values that differ by rounding alone are drawn as a constant.
    is_constant = high - low <= 1e-9 * max(abs(low), abs(high))
    margin = (abs(high) * 0.1 or 1.0) if is_constant else 0.06 * (high - low)
    if low != 0.0:
        low -= margin
    return low, min(1.0, high + margin) if share and high <= 1.0 else high + margin


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round values (1, 2 or 5 times
    a power of ten apart) within [low, high].
    """
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * raw)
    first = math.ceil(low / step - 1e-9)
    return [multiple * step for multiple in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """All ticks of an axis with one unit and one number of decimals."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    unit, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    if 0 < largest < 1e-2:
        return [f"{tick:.1e}".replace("e-0", "e-") if tick else "0" for tick in ticks]
    gap = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=1.0) / unit
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [f"{tick / unit:.{decimals}f}{suffix if tick else ''}" for tick in ticks]


def _axes(x: _Scale, y: _Scale, x_label: str) -> str:
    parts = []
    ticks = _ticks(y.low, y.high, 5)
    for tick, text in zip(ticks, _tick_texts(ticks), strict=True):
        parts.append(f'<path class="grid" d="M{LEFT:g} {y(tick):g}H{WIDTH - RIGHT:g}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7:g}" y="{y(tick) + 3.5:g}" text-anchor="end">'
            f"{text}</text>"
        )
    bottom = HEIGHT - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT:g} {bottom:g}H{WIDTH - RIGHT:g}"/>')
    ticks = [tick for tick in _ticks(x.low, x.high, 4) if tick == int(tick)]
    for tick, text in zip(ticks, _tick_texts(ticks), strict=True):
        parts.append(f'<path class="axis" d="M{x(tick):g} {bottom:g}v4"/>')
        # A text near the edge would run over it.
        at_edge = x(tick) > WIDTH - 18
        text_x, anchor = (WIDTH - 1, "end") if at_edge else (x(tick), "middle")
        parts.append(
            f'<text class="tick" x="{text_x:g}" y="{bottom + 16:g}" text-anchor="{anchor}">'
            f"{text}</text>"
        )
    parts.append(
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 4:g}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _bands(chart: Chart, columns: Sequence[tuple[float, list[float | None]]], x: _Scale) -> str:
    """An invisible strip per point of the grid,
    whose title and line the pointer shows.
    """
    centres = [x(at) for at, _ in columns]
    middles = [(a + b) / 2 for a, b in zip(centres, centres[1:], strict=False)]
    borders = [LEFT, *middles, WIDTH - RIGHT]
    parts = []
    for number, (at, row) in enumerate(columns):
        lines = [f"{chart.x_label} {round(at):,}"]
        lines += [
            f"{series.name}: {format_number(y)}"
            for series, y in zip(chart.series, row, strict=True)
            if y is not None
        ]
        left, right = borders[number], borders[number + 1]
        parts.append(
            f'<g class="band"><title>{escape(chr(10).join(lines))}</title>'
            f'<rect x="{left:.2f}" y="{TOP:g}" width="{right - left:.2f}" '
            f'height="{HEIGHT - BOTTOM - TOP:g}"/>'
            f'<path d="M{centres[number]:g} {TOP:g}V{HEIGHT - BOTTOM:g}"/></g>'
        )
    return "".join(parts)


def _style(series: Series) -> str:
    return f"c{series.colour % COLOURS} d{series.dash % DASHES}"


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2 and not series[0].name:
        return ""
    swatch = '<svg viewBox="0 0 26 8" aria-hidden="true"><path class="line {}" d="M1 4H25"/></svg>'
    entries = "".join(
        f"<li>{swatch.format(_style(line))}{escape(line.name)}</li>" for line in series
    )
    return f'<ul class="legend">{entries}</ul>'


def _spoken(chart: Chart) -> str:
    """The chart in words, for those who cannot see it."""
    ends = [
        f"{curve.name or 'value'} from {format_number(curve.points[0][1])} "
        f"to {format_number(curve.points[-1][1])}"
        for curve in chart.series
        if curve.points
    ]
    return f"Line chart, {chart.title} by {chart.x_label}: " + "; ".join(ends)
