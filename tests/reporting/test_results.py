"""results.json's form, and the table of it."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from ilrec_dist.reporting.results import (
    Interval,
    best_mean,
    intervals_of,
    print_table,
    summarise_rows,
    write_results,
)
from tests.support.realistic_report import LABELS, interval, result_rows


def test_results_json_has_the_documented_form(tmp_path):
    rows = result_rows([0, 1, 2])
    path = tmp_path / "results.json"
    seconds = {"prepare": 1.0, "train": np.float64(8.5)}
    returned = write_results(
        path,
        "instruments",
        rows,
        12.5,
        seconds,
        extras={"machine": {"cores": np.int64(2)}},
        intervals=[interval()],
    )
    read = json.loads(path.read_text())
    assert read == returned
    assert list(read) == [
        "dataset",
        "split",
        "rows",
        "seconds",
        "stage_seconds",
        "paired_bootstrap",
        "machine",
    ]
    assert (
        read["split"] == "test"
        and read["seconds"] == 12.5
        and read["stage_seconds"] == {"prepare": 1.0, "train": 8.5}
    )
    for row in read["rows"]:
        assert list(row)[:9] == [
            "method",
            "hit@1",
            "hit@5",
            "hit@10",
            "ndcg@5",
            "ndcg@10",
            "users",
            "seed",
            "exclude_seen",
        ]
        assert (
            isinstance(row["users"], int)
            and isinstance(row["seed"], int)
            and isinstance(row["exclude_seen"], bool)
        )
    assert {row["method"] for row in read["rows"]} == {
        "popularity",
        "transitions",
        "sasrec",
        "sft",
        "ilrec",
        "bayes",
    }
    assert intervals_of(read) == [interval()]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ndcg@10": 0.9}, "above hit@10"),
        ({"hit@5": 7.1}, "not a fraction"),
        ({"hit@5": float("nan")}, "not a fraction"),
        ({"users": None}, "lacks"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused_and_nothing_is_written(tmp_path, change, message):
    row = result_rows([0])[0] | change
    row = {key: value for key, value in row.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        write_results(tmp_path / "results.json", "x", [row], 1.0, {})
    assert list(tmp_path.iterdir()) == []


def test_extras_may_not_hide_the_fixed_keys(tmp_path):
    with pytest.raises(ValueError, match="rows"):
        write_results(tmp_path / "results.json", "x", [], 1.0, {}, extras={"rows": []})


def test_summaries_are_ordered_and_averaged():
    rows = [row | {"hit@10": 0.2 + 0.01 * row["seed"]} for row in result_rows([2, 0, 1])]
    summaries = summarise_rows(reversed(rows), LABELS)
    assert [(one.method, one.exclude_seen) for one in summaries] == [
        (method, excluded)
        for excluded in (True, False)
        for method in ("popularity", "transitions", "sasrec", "sft", "ilrec", "bayes")
    ]
    ilrec = summaries[4]
    assert ilrec.figures["hit@10"].mean == pytest.approx(0.21) and ilrec.figures[
        "hit@10"
    ].std == pytest.approx(0.01)
    assert sorted(ilrec.seeds) == [0, 1, 2] and "expected_ndcg@10" in ilrec.figures
    assert summaries[0].figures["hit@10"].std is None


def test_the_table_fits_eighty_columns_and_shows_all():
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    kept = Interval("ilrec", "sft", "ndcg@10", -0.001, -0.002, 0.0005, exclude_seen=False)
    print_table(result_rows([0, 1, 2]), [interval(), kept], LABELS, console=console)
    text = console.file.getvalue()
    assert "…" not in text
    excluded, kept_table = text.split("items of the history kept")
    for word in (
        "popularity",
        "transitions",
        "sasrec",
        "sft",
        "ilrec",
        "bayes",
        "expected",
        "±",
        "24,772 users",
        "seeds",
    ):
        assert word in excluded
    assert (
        "paired 95% interval [+0.0021, +0.0058]" in excluded
        and "interval [-0.0020, +0.0005]" in kept_table
    )
    assert "expected" not in kept_table


def test_users_with_nothing_left_are_shown_under_their_treatment():
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    rows = [
        row | {"users_without_items": 12 if row["exclude_seen"] else 0} for row in result_rows([0])
    ]
    print_table(rows, labels=LABELS, console=console)
    excluded, kept = console.file.getvalue().split("items of the history kept")
    assert "12 of 24,772 users have nothing left to recommend" in excluded
    assert "nothing left" not in kept


def test_long_names_of_methods_fold():
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    rows = [row | {"method": row["method"] + "+cf+transitions"} for row in result_rows([0, 1])]
    print_table(rows, console=console)
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_a_bound_is_never_the_best_and_a_method_without_a_label_comes_last():
    summaries = summarise_rows(result_rows([0]), LABELS[3:])
    assert [one.method for one in summaries[:6]] == [
        *("sft", "ilrec", "bayes"),
        *("popularity", "sasrec", "transitions"),
    ]
    first = [one for one in summaries if one.exclude_seen]
    best = {one.method: one.figures["ndcg@10"].mean for one in first if one.method != "bayes"}
    assert best_mean(first, "ndcg@10") == max(best.values())


def test_a_table_of_one_seed_has_no_spread():
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    print_table(result_rows([7])[:5], console=console)
    assert "±" not in console.file.getvalue() and "seeds" not in console.file.getvalue()
