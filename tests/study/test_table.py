"""The table as text, and its place in a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ilrec_dist.cli.main import main
from ilrec_dist.reporting.results import Figure, Interval
from ilrec_dist.study.table import around_table, flops_text, interval_text, memory_text, write_into
from tests.support.tiny_study import write_study

ROOT = Path(__file__).parents[2]


def place(*names: str) -> str:
    return "\n".join(f"<!-- study {name} -->\n<!-- end of study {name} -->" for name in names)


def test_a_table_takes_the_place_that_its_study_has_on_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Results\n{place('one', 'one-more')}\nOther words.\n")
    write_into(page, "one-more", "second table")
    write_into(page, "one", "first table")
    write_into(page, "one", "newer table")
    text = page.read_text()
    assert text.index("newer table") < text.index("<!-- study one-more") < text.index("second")
    assert "first table" not in text and text.endswith("Other words.\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "page.md: cannot be read"),
        ("# Results\n", "page.md: no place for the table of study tiny-study; write the lines"),
        (place("tiny-study-more"), "no place for the table of study tiny-study;"),
        ("<!-- study tiny-study -->", "<!-- end of study tiny-study --> where it is to stand"),
    ],
)
def test_a_page_without_a_place_is_refused_before_any_cell_runs(tmp_path, capsys, text, expected):
    path, page = write_study(tmp_path, seeds=[0]), tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    assert main(["study", str(path), "--into", str(page)]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert text is None or page.read_text() == text


def test_the_results_page_has_a_place_for_every_study_that_make_results_runs():
    ran = re.findall(r"configs/(study-[\w-]+)\.yaml", (ROOT / "Makefile").read_text())
    assert len(ran) > 4
    for name in ran:
        assert yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())["name"] == name
        before, after = around_table(ROOT / "docs/results.md", name)
        assert before and after


def test_numbers_are_written_as_tables_have_them():
    interval = Interval("ilrec", "sft", "ndcg@10", 0.0012, -0.0003, 0.0027)
    assert interval_text(interval) == "+.0012 [-.0003, +.0027]"
    assert interval_text(None) == flops_text(None) == ""
    assert flops_text(Figure(1.234e15, None)) == "1.23e15"
    assert memory_text(Figure(3 * 2**29, None)) == "1.50 GiB"
