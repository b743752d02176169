"""report.html: alone, offline, escaped, complete; and the arithmetic of its charts."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from ilrec_dist.config.load import dump_config
from ilrec_dist.config.tree import Config
from ilrec_dist.reporting.html import charts, curves
from ilrec_dist.reporting.html.charts import Chart, Series, line_chart
from ilrec_dist.reporting.html.curves import MethodMetrics, loss_charts, loss_position_charts
from ilrec_dist.reporting.html.examples import Example
from ilrec_dist.reporting.html.report import write_report
from ilrec_dist.reporting.results import Interval, write_results
from tests.support.realistic_report import (
    HOSTILE,
    LABELS,
    examples,
    interval,
    metric_lines,
    result_rows,
)

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting and collects what a browser would make of the page."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def runs():
    return [
        MethodMetrics(method, seed, metric_lines(method, seed))
        for method in ("sft", "ilrec")
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def html(tmp_path_factory, runs):
    folder = tmp_path_factory.mktemp("run")
    results = write_results(
        folder / "results.json",
        HOSTILE,
        result_rows([0, 1]),
        99.0,
        {"prepare": 1.0, HOSTILE: 70.0},
        intervals=[interval()],
    )
    path = write_report(
        folder,
        name=HOSTILE,
        results=results,
        metrics=runs,
        labels=LABELS,
        examples=examples(),
        config_yaml=dump_config(Config(name=HOSTILE)),
        index_report={
            "collisions": {"before": 12, "after": 0},
            "levels": [{"codes": 256, "used": 250}],
            HOSTILE: HOSTILE,
        },
        cf_report={
            "folds": 2,
            "models": {
                "full": {
                    "curve": [
                        {"epoch": epoch, "loss": 6.0 / epoch, "ndcg@10": 0.01 * epoch}
                        for epoch in range(1, 11)
                    ]
                }
            },
        },
    )
    assert path == folder / "report.html" and {file.name for file in folder.iterdir()} == {
        "report.html",
        "results.json",
    }
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_alone_and_without_scripts(html):
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "object", "embed", "b", "form"} & set(page.tags)
    for _, key, value in page.attributes:
        assert not key.startswith("on") and key not in ("src", "srcset", "xlink:href")
        assert key != "href" or value.startswith("#")
    assert "url(" not in html and "@import" not in html
    assert ("meta", "http-equiv", "Content-Security-Policy") in page.attributes
    targets = {value for _, key, value in page.attributes if key == "id"}
    assert {value[1:] for _, key, value in page.attributes if key == "href"} <= targets
    assert len(html) < 1_500_000


def test_hostile_titles_are_shown_as_they_are(html):
    text = "".join(Page(html).text)
    # It stands in title, heading, subtitle, stage, target, beams, report and configuration.
    assert text.count(HOSTILE) >= 7
    assert HOSTILE not in html


def test_everything_is_on_the_page(html):
    text = " ".join(Page(html).text)
    for title in (
        "Total loss", "CPO", "CPD", "CRR", "CPO by position, sft", "CRR by position, ilrec",
        "Validation NDCG@10", "Mean |H|, ilrec", "Rows with empty H, ilrec",
        "Rows with capped H, ilrec", "Valid-next share of H, ilrec",
        "KL to the final layer, ilrec", "Mean p(y) by position, ilrec", "Reward coverage",
        "Tokens per second", "position 4", "layer 3", "ilrec, seed 1",
        "items of the history kept", "expected NDCG@10", "levels 1", "codes 256, used 250",
        "Collaborative models, loss", "10 entries", "Resolved configuration",
        "max_negatives: 64", "collisions · before",
    ):  # fmt: skip
        assert title in text, title
    # SFT has nothing to show here.
    assert "Mean |H|, sft" not in text and "CPD by position, sft" not in text
    assert text.count("✓ hit") >= 5 and "target at rank" in text and "… 4 earlier" in text
    assert "paired 95% interval [+0.0021, +0.0058]" in text


def test_a_report_without_training_or_examples(tmp_path):
    results = write_results(tmp_path / "results.json", "x", result_rows([0])[:1], 1.0, {})
    text = "".join(
        Page(write_report(tmp_path, name="bare", results=results, metrics=[]).read_text()).text
    )
    assert (
        "popularity" in text
        and "Losses" not in text
        and "Examples" not in text
        and "Configuration" not in text
    )


def test_both_treatments_warnings_and_what_prepare_did_are_on_the_page(tmp_path):
    kept = Interval("ilrec", "sft", "ndcg@10", -0.0051, -0.0071, -0.0031, exclude_seen=False)
    rows = [row | {"users_without_items": 3 * row["exclude_seen"]} for row in result_rows([0])]
    results = write_results(
        tmp_path / "results.json", "x", rows, 1.0, {}, intervals=[interval(), kept]
    )
    page = write_report(
        tmp_path,
        name="both",
        results=results,
        metrics=[],
        labels=LABELS,
        data_report={"summary": "9 users read, 4 dropped", "rejected": 0},
        warnings=["30 % of the items share a code <b>"],
    ).read_text()
    text = "".join(Page(page).text)
    assert "Items of the history excluded: ilrec − sft, NDCG@10: +0.0039" in text
    assert "Items of the history kept: ilrec − sft, NDCG@10: -0.0051" in text
    assert "excluded: 3 of 24,772 users have nothing left" in text and "kept: 3 of" not in text
    assert "Warning: 30 % of the items share a code <b>" in text
    assert "9 users read, 4 dropped" in text
    assert "ILRec against sft" in text and "Beyond accuracy" not in text


def test_measures_beside_accuracy_have_a_table(tmp_path):
    rows = [row | {"coverage@10": 0.25} for row in result_rows([0])]
    rows[4] |= {"calibration_error": 0.0125}
    results = write_results(tmp_path / "results.json", "x", rows, 1.0, {})
    path = write_report(tmp_path, name="more", results=results, metrics=[], labels=LABELS)
    text = "|".join(Page(path.read_text()).text)
    assert "|ilrec|0.2500|0.0125|" in text and "|sft|0.2500|–|" in text and "Gini" not in text


def test_a_miss_is_said(tmp_path):
    results = write_results(tmp_path / "results.json", "x", [], 1.0, {})
    example = Example("u", ["a"], "b", {"sft": [("c", -1.0), ("d", -2.5)]})
    page = write_report(
        tmp_path, name="miss", results=results, metrics=[], examples=[example]
    ).read_text()
    assert "target not among the 2 beams" in page and "✓ hit" not in page and "−2.50" in page


@pytest.mark.parametrize("layers", [8, 29])
def test_the_agreement_of_many_layers_is_drawn_over_the_layers(layers):
    lines = [
        {"step": 10 * (number + 1)}
        | {f"validation/agreement/layer{n}": n / 100 + number / 10 for n in range(1, layers + 1)}
        for number in range(6)
    ]
    (chart,) = curves.signal_charts([MethodMetrics("ilrec", 0, lines)])
    if layers == 8:
        assert [series.name for series in chart.series] == [f"layer {n}" for n in range(8, 0, -1)]
        assert chart.x_label == "step" and all(len(line.points) == 6 for line in chart.series)
        return
    # The first validation, the last, and two between.
    assert [series.name for series in chart.series] == ["step 10", "step 30", "step 40", "step 60"]
    assert chart.x_label == "layer" and len({series.colour for series in chart.series}) == 4
    assert chart.series[0].points == [(n, n / 100) for n in range(1, 30)]
    assert chart.series[3].points[28] == (29, pytest.approx(0.79))
    (chart,) = curves.signal_charts([MethodMetrics("ilrec", 0, lines[:1])])
    assert [series.name for series in chart.series] == ["step 10"]
    assert "layer" in line_chart(chart)


def test_long_curves_are_binned_into_means():
    points = [(float(x), float(x % 2)) for x in range(10_000)]
    columns = charts._columns([Series("a", points), Series("b", points[:5000])])
    assert len(columns) == charts.MAX_BINS and columns[0][0] == 0 and columns[-1][0] == 9999
    assert all(abs(row[0] - 0.5) < 0.01 for _, row in columns)
    assert [row[1] is None for _, row in columns].count(True) == charts.MAX_BINS // 2


def test_sparse_and_single_points_are_drawn():
    one = line_chart(Chart("t", [Series("a", [(5.0, 2.0)])]))
    assert one.count("<circle") == 1 and "nan" not in one
    flat = line_chart(
        Chart("t", [Series("a", [(1.0, 0.0), (2.0, 0.0)]), Series("b", [(1.5, 0.0)])])
    )
    assert "nan" not in flat and "inf" not in flat and flat.count('class="band"') == 3
    assert line_chart(Chart("t", [])) == ""


def test_values_that_differ_by_rounding_alone_are_drawn_as_a_constant():
    value = 0.6309297535714575
    points = [(1.0, value), (2.0, value + 1e-16), (3.0, value - 1e-16)]
    figure = line_chart(Chart("t", [Series("a", points)]))
    assert "<polyline" in figure and "nan" not in figure


def test_what_the_pointer_shows_is_what_was_logged():
    figure = line_chart(Chart("t", [Series("a<b", [(10.0, 1.23456), (20.0, 2.0)])]))
    assert "<title>step 10\na&lt;b: 1.235</title>" in figure


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.0, 26000.0, ["0", "5k", "10k", "15k", "20k", "25k"]),
        (0.0, 0.002, ["0", "5.0e-4", "1.0e-3", "1.5e-3", "2.0e-3"]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert charts._tick_texts(charts._ticks(low, high, 5)) == expected


def test_seeds_are_averaged_where_both_logged():
    runs = [
        MethodMetrics(
            "ilrec",
            seed,
            [
                {"step": 10, "loss/cpo/pos0": 1.0 + seed, "loss/cpo": 2.0},
                {"step": 20, "loss/cpo/pos0": None},
            ],
        )
        for seed in (0, 1)
    ]
    (chart,) = curves.loss_position_charts(runs)
    assert [(series.name, series.points) for series in chart.series] == [
        ("position 1", [(10, 1.5)]),
        ("all", [(10, 2.0)]),
    ]


def test_coordinates_stay_within_the_picture(html):
    for points in re.findall(r'<polyline class="line [^"]*" points="([^"]*)"', html):
        for pair in points.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT


def test_a_loss_term_that_the_report_does_not_know_is_drawn_by_its_name():
    lines = [{"step": s, "loss/xyz": s / 2, "loss/total": s, "loss/xyz/pos0": s} for s in (1, 2)]
    runs = [MethodMetrics("made-up", 0, lines)]
    assert [chart.title for chart in loss_charts(runs)] == ["Total loss", "XYZ"]
    assert [chart.title for chart in loss_position_charts(runs)] == ["XYZ by position, made-up"]
