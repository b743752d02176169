"""The table as text, and its place in a page."""

from __future__ import annotations

import pytest

from ilrec_dist.cli.main import main
from ilrec_dist.common.errors import UserError
from ilrec_dist.reporting.results import Figure, Interval
from ilrec_dist.study.table import flops_text, interval_text, memory_text, write_into
from tests.support.tiny_study import write_study


def test_a_table_takes_the_place_of_the_one_before_or_the_end_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Results\n\nOther words.\n")
    write_into(page, "one", "first table")
    write_into(page, "two", "second table")
    write_into(page, "one", "newer table")
    text = page.read_text()
    assert text.startswith("# Results\n\nOther words.\n\n## Study `one`\n\n<!-- study one -->")
    assert text.index("newer table") < text.index("## Study `two`") < text.index("second table")
    assert "first table" not in text and text.count("## Study") == 2
    with pytest.raises(UserError, match="none.md: cannot be read"):
        write_into(tmp_path / "none.md", "one", "table")


def test_a_page_that_is_not_there_is_refused_before_any_cell_runs(tmp_path, capsys):
    path = write_study(tmp_path, seeds=[0])
    assert main(["study", str(path), "--into", str(tmp_path / "none.md")]) == 2
    assert "none.md: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_numbers_are_written_as_tables_have_them():
    interval = Interval("ilrec", "sft", "ndcg@10", 0.0012, -0.0003, 0.0027)
    assert interval_text(interval) == "+.0012 [-.0003, +.0027]"
    assert interval_text(None) == flops_text(None) == ""
    assert flops_text(Figure(1.234e15, None)) == "1.23e15"
    assert memory_text(Figure(3 * 2**29, None)) == "1.50 GiB"
