"""`ilrec export-data` and `--max-bad-rows` through the command line."""

import json
from pathlib import Path

import pytest

from ilrec_dist.cli.main import main
from ilrec_dist.data.dataset import load_dataset

ROWS = [(f"u{user}", f"i{(3 * user + step) % 7}", step) for user in range(8) for step in range(5)]


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "rows.csv").write_text(
        "user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in ROWS)
    )
    (tmp_path / "c.yaml").write_text(
        f"name: t\nruns_dir: {tmp_path}/runs\ndata: {{format: csv, path: {tmp_path}/rows.csv}}\n"
    )
    return tmp_path / "c.yaml"


@pytest.mark.parametrize(
    ("form", "files"),
    [("lcrec", ["Shop.inter.json", "Shop.item.json"]), ("recbole", ["Shop.inter", "Shop.item"])],
)
def test_export_data_writes_what_prepare_reads_back(config, tmp_path, form, files):
    assert main(["prepare", str(config)]) == 0
    assert (
        main(
            [
                "export-data",
                str(tmp_path / "runs/t"),
                "--format",
                form,
                "--out",
                str(tmp_path / "Shop"),
            ]
        )
        == 0
    )
    assert sorted(path.name for path in (tmp_path / "Shop").iterdir()) == files
    assert (
        main(
            [
                "prepare",
                str(config),
                "name=back",
                f"data.format={form}",
                f"data.path={tmp_path}/Shop",
            ]
        )
        == 0
    )
    before, after = (
        load_dataset(tmp_path / "runs/t/data"),
        load_dataset(tmp_path / "runs/back/data"),
    )
    assert (
        after.items.tolist() == before.items.tolist()
        and after.offsets.tolist() == before.offsets.tolist()
    )
    assert list(after.user_ids) == list(before.user_ids) and list(after.item_ids) == list(
        before.item_ids
    )


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    assert main([str(part) for part in argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_export_data_refuses_a_run_without_data_and_a_folder_that_exists(config, tmp_path, capsys):
    message = refused(
        capsys, "export-data", tmp_path / "runs/t", "--format", "lcrec", "--out", tmp_path / "Shop"
    )
    assert "not a prepared data folder" in message and not (tmp_path / "Shop").exists()
    main(["prepare", str(config)])
    (tmp_path / "Shop").mkdir()
    (tmp_path / "Shop/mine.txt").write_text("keep")
    assert "exists already" in refused(
        capsys, "export-data", tmp_path / "runs/t", "--format", "lcrec", "--out", tmp_path / "Shop"
    )
    assert (tmp_path / "Shop/mine.txt").read_text() == "keep"


def test_max_bad_rows_tolerates_and_counts(config, tmp_path, capsys):
    with open(tmp_path / "rows.csv", "a") as file:
        file.write("u1,i1\n,i1,9\n")
    message = refused(capsys, "prepare", config)
    assert (
        "rows.csv: line 42: malformed row: 2 fields, expected 3" in message
        and "--max-bad-rows" in message
    )
    assert "line 43: no user id (bad row 2" in refused(
        capsys, "prepare", config, "--max-bad-rows", "1"
    )
    assert not (tmp_path / "runs/t/data").exists()
    assert main(["prepare", str(config), "--max-bad-rows", "2"]) == 0
    assert json.loads((tmp_path / "runs/t/data/manifest.json").read_text())["read"]["bad_rows"] == 2
    rejects = [
        json.loads(line)
        for line in (tmp_path / "runs/t/data/rejects.jsonl").read_text().splitlines()
    ]
    assert [row["line"] for row in rejects] == [42, 43]
    assert "data.max_bad_rows" in refused(capsys, "prepare", config, "--max-bad-rows", "many")
