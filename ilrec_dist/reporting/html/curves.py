"""The curves of a report: from the metric
names of a training (METHOD.md §6) to charts.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ilrec_dist.reporting.html.charts import Chart, Series

POSITION = re.compile(r"^(?P<stem>.+)/pos(?P<number>\d+)$")
LAYER = re.compile(r"^kl/layer(?P<number>\d+)$")
AGREEMENT = re.compile(r"^validation/agreement/layer(?P<number>\d+)$")

# Layers with a curve each; of more than these, a chart has curves over the layers.
LAYER_CURVES = 8
# Validations with a curve over the layers.
VALIDATION_CURVES = 4

# What the report says of the loss terms that it knows. Any other term is drawn by its name.
LOSS_NOTES = {
    "loss/total": ("Total loss", "the sum of the weighted terms, per row"),
    "loss/cpo": (
        "CPO",
        "cross-entropy with the negatives made harder; plain cross-entropy where β is 0",
    ),
    "loss/cpd": ("CPD", "KL of the intermediate layers to the final one, before μ"),
    "loss/crr": ("CRR", "cross-entropy to the collaborative soft label, before λ"),
}
NEGATIVES = (
    ("negatives/mean", "Mean |H|", "self-hard negatives per row", False),
    (
        "negatives/empty",
        "Rows with empty H",
        "share; the target already leads the ensemble, or it is the only continuation",
        True,
    ),
    (
        "negatives/capped",
        "Rows with capped H",
        "share; more candidates than max_negatives passed the threshold",
        True,
    ),
    ("negatives/valid_next", "Valid-next share of H", "negatives that lead to a real item", True),
)


@dataclass(frozen=True)
class MethodMetrics:
    """The metrics.jsonl of one training run, as read_metrics gives it."""

    method: str
    seed: int
    lines: Sequence[dict[str, Any]]

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever the key was logged with a number."""
        return [
            (line["step"], float(line[key]))
            for line in self.lines
            if isinstance(line.get(key), int | float)
        ]

    def last(self, key: str, lines: int = 20) -> float | None:
        """The mean of the last logged values, which one batch does not sway."""
        values = [value for _, value in self.points(key)[-lines:]]
        return statistics.fmean(values) if values else None


def loss_charts(runs: Sequence[MethodMetrics]) -> list[Chart]:
    return _present(_per_run(runs, key, *_loss_note(key)) for key in _loss_terms(runs))


def loss_position_charts(runs: Sequence[MethodMetrics]) -> list[Chart]:
    terms = [key for key in _loss_terms(runs) if key != "loss/total"]
    return _by_method(
        runs,
        lambda method, of: [
            _per_position(of, key, f"{_loss_note(key)[0]} by position, {method}", "")
            for key in terms
        ],
    )


def _loss_terms(runs: Sequence[MethodMetrics]) -> list[str]:
    """The metrics of loss terms that were logged,
    without those by position; the total first.
    """
    logged = {key: None for run in runs for line in run.lines for key in line}
    terms = [key for key in logged if key.startswith("loss/") and key.count("/") == 1]
    return sorted(terms, key=lambda key: key != "loss/total")


def _loss_note(key: str) -> tuple[str, str]:
    """The title and the explanation of a loss term's chart."""
    return LOSS_NOTES.get(key, (key.removeprefix("loss/").upper(), "before its weight"))


def validation_charts(runs: Sequence[MethodMetrics]) -> list[Chart]:
    validation = [
        _per_run(runs, f"validation/{metric}@10", f"Validation {title}@10", "", marks=True)
        for metric, title in (("ndcg", "NDCG"), ("hit", "Hit"))
    ]
    return _present(
        [
            *validation,
            _per_run(
                runs,
                "p_target",
                "Mean p(y) in training",
                "probability of the target token under the final layer",
            ),
        ]
    )


def negative_charts(runs: Sequence[MethodMetrics]) -> list[Chart]:
    # Methods that look for no negatives log 0.
    runs = [run for run in runs if any(value != 0 for _, value in run.points("negatives/mean"))]
    return _by_method(
        runs,
        lambda method, of: [
            _per_position(of, key, f"{title}, {method}", note, share)
            for key, title, note, share in NEGATIVES
        ],
    )


def signal_charts(runs: Sequence[MethodMetrics]) -> list[Chart]:
    note = "share of the rows with negatives in which the collaborative model scored one of them"
    layers = _by_method(
        runs,
        lambda method, of: [
            _per_layer(of, f"KL to the final layer, {method}"),
            _agreement(of, f"Agreement with the final layer, {method}"),
            *_layers_by_position(of, method),
        ],
    )
    rewards = _present([_per_run(runs, "rewards/coverage", "Reward coverage", note, share=True)])
    return (
        layers
        + rewards
        + _by_method(
            runs,
            lambda method, of: [
                _per_position(of, "p_target", f"Mean p(y) by position, {method}", "")
            ],
        )
    )


def speed_charts(runs: Sequence[MethodMetrics]) -> list[Chart]:
    keys = (
        ("rate/tokens_per_second", "Tokens per second"),
        ("rate/rows_per_second", "Rows per second"),
        ("rate/mfu", "Share of the GPUs' peak (MFU)"),
        ("learning_rate", "Learning rate"),
    )
    return _present(
        [
            *(_per_run(runs, key, title, "") for key, title in keys),
            _per_run(runs, "grad_norm", "Gradient norm", "before clipping"),
        ]
    )


def cf_charts(models: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Loss and validation NDCG@10 of the collaborative models by epoch."""
    charts = []
    for key, title in (
        ("loss", "Collaborative models, loss"),
        ("ndcg@10", "Collaborative models, validation NDCG@10"),
    ):
        series = []
        for index, (name, report) in enumerate(models.items()):
            points = [
                (float(line["epoch"]), float(line[key]))
                for line in report.get("curve", ())
                if isinstance(line.get(key), int | float)
            ]
            series.append(Series(name, points, index))
        charts.append(Chart(title, series, x_label="epoch", marks=True))
    return _present(charts)


def _per_run(
    runs: Sequence[MethodMetrics],
    key: str,
    title: str,
    note: str,
    share: bool = False,
    marks: bool = False,
) -> Chart:
    """A curve per method and seed: colour by method, dash by seed.

    A run in which the figure is 0 throughout has nothing to show.
    """
    methods, seeds = _methods(runs), sorted({run.seed for run in runs})
    series = []
    for run in runs:
        points = run.points(key)
        if any(value != 0 for _, value in points):
            name = run.method if len(seeds) == 1 else f"{run.method}, seed {run.seed}"
            series.append(Series(name, points, methods.index(run.method), seeds.index(run.seed)))
    return Chart(title, series, note, share=share, marks=marks)


def _per_position(
    runs: Sequence[MethodMetrics], stem: str, title: str, note: str, share: bool = False
) -> Chart:
    """A curve per position in the item, counted
    from 1, and one for all rows; mean over seeds.
    """
    numbers = sorted(
        {
            int(match["number"])
            for run in runs
            for key in _keys(run)
            if (match := POSITION.match(key)) and match["stem"] == stem
        }
    )
    series = [
        Series(f"position {number + 1}", _mean(runs, f"{stem}/pos{number}"), number)
        for number in numbers
    ]
    total = _mean(runs, stem)
    if total and numbers:
        series.append(Series("all", total, 7, 1))
    return Chart(
        title,
        series if any(y != 0 for line in series for _, y in line.points) else [],
        note,
        share=share,
    )


def _per_layer(runs: Sequence[MethodMetrics], title: str) -> Chart:
    numbers = sorted(
        {int(match["number"]) for run in runs for key in _keys(run) if (match := LAYER.match(key))},
        reverse=True,
    )
    series = [
        Series(f"layer {number}", _mean(runs, f"kl/layer{number}"), index)
        for index, number in enumerate(numbers)
    ]
    return Chart(title, series, "KL(final ‖ layer), mean over rows")


def _agreement(runs: Sequence[MethodMetrics], title: str) -> Chart:
    numbers = sorted(
        {
            int(match["number"])
            for run in runs
            for key in _keys(run)
            if (match := AGREEMENT.match(key))
        },
        reverse=True,
    )
    points = {number: _mean(runs, f"validation/agreement/layer{number}") for number in numbers}
    note = "share of validation rows in which the layer's best continuation is the final one's"
    if len(numbers) <= LAYER_CURVES:
        series = [
            Series(f"layer {number}", points[number], index) for index, number in enumerate(numbers)
        ]
        return Chart(title, series, note, share=True, marks=True)
    steps = sorted({step for of_layer in points.values() for step, _ in of_layer})
    ends = range(VALIDATION_CURVES)
    shown = sorted({steps[round(end * (len(steps) - 1) / ends[-1])] for end in ends})
    by_step = {
        step: [(number, dict(points[number])) for number in reversed(numbers)] for step in shown
    }
    series = [
        Series(
            f"step {step:,.0f}",
            [(float(number), values[step]) for number, values in layers if step in values],
            index,
        )
        for index, (step, layers) in enumerate(by_step.items())
    ]
    return Chart(title, series, note, x_label="layer", share=True, marks=True)


def _layers_by_position(runs: Sequence[MethodMetrics], method: str) -> list[Chart]:
    numbers = sorted(
        {int(match["number"]) for run in runs for key in _keys(run) if (match := LAYER.match(key))},
        reverse=True,
    )
    return [
        _per_position(
            runs,
            f"kl/layer{number}",
            f"KL to the final layer by position, layer {number}, {method}",
            "",
        )
        for number in numbers
    ]


def _by_method(
    runs: Sequence[MethodMetrics], make: Callable[[str, Sequence[MethodMetrics]], list[Chart]]
) -> list[Chart]:
    charts: list[Chart] = []
    for method in _methods(runs):
        charts += _present(make(method, [run for run in runs if run.method == method]))
    return charts


def _mean(runs: Sequence[MethodMetrics], key: str) -> list[tuple[float, float]]:
    """Mean over the runs that logged the key at a step."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for step, value in run.points(key):
            values.setdefault(step, []).append(value)
    return [(step, statistics.fmean(values[step])) for step in sorted(values)]


def _present(charts: Iterable[Chart]) -> list[Chart]:
    shown = (
        Chart(
            chart.title,
            [line for line in chart.series if line.points],
            chart.note,
            chart.x_label,
            chart.share,
            chart.marks,
        )
        for chart in charts
    )
    return [chart for chart in shown if chart.series]


def _methods(runs: Sequence[MethodMetrics]) -> list[str]:
    """The runs' methods in the order of the runs."""
    return list(dict.fromkeys(run.method for run in runs))


def _keys(run: MethodMetrics) -> set[str]:
    return {key for line in run.lines for key in line}
