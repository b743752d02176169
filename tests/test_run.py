"""The whole path through the command line.

Every stage, the results in their documented form, recommendations; nothing runs twice.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ilrec_dist.cli.main import main
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.config.load import load_config
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.evaluation.predictions import recompute
from ilrec_dist.pipeline.status import status_lines
from ilrec_dist.reporting.counter import Count, write_counter
from ilrec_dist.reporting.results import BEYOND_ACCURACY
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow

METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a configuration and its finished run, tp 2 under torchrun."""
    root = tmp_path_factory.mktemp("run")
    sections = {
        "launch": {"engine": "torchrun", "workers": 2, "tp": 2, "threads": 1, "device": "cpu"},
        "items": {"collisions": "resolve"},
        "train": {"epochs": 1},
    }
    sections["cf"] = {"split_table": True}
    sections["data"] = {"both_directions": True}
    (root / "c.yaml").write_text(
        yaml.safe_dump(config_to_dict(tiny_config(root / "runs", **sections)))
    )
    assert main(["run", str(root / "c.yaml")]) == 0
    return root


def test_results_hold_every_row_in_the_documented_form(finished):
    results = json.loads((finished / "runs/tiny/results.json").read_text())
    assert results["dataset"] == "synthetic" and results["split"] == "test"
    rows = {(row["method"], row["exclude_seen"]): row for row in results["rows"]}
    assert set(rows) == {
        (m, e)
        for m in ("popularity", "transitions", "sasrec", "bayes", "sft", "ilrec")
        for e in (True, False)
    }
    dataset = load_dataset(finished / "runs/tiny/data")
    for row in rows.values():
        assert row["users"] == dataset.num_users and row["seed"] == 0
        assert all(0 <= row[metric] <= 1 for metric in METRICS) and row["ndcg@10"] <= row["hit@10"]
        assert all(row[measure] >= 0 for measure in BEYOND_ACCURACY)
        assert row["calibration_error"] < 1
    assert rows["bayes", True]["ndcg@10"] > rows["popularity", True]["ndcg@10"]
    assert set(results["stage_seconds"]) == {
        "prepare",
        "index",
        "cf",
        "rewards",
        "train sft seed 0",
        "train ilrec seed 0",
        "evaluate",
    }
    assert results["seconds"] > 0
    assert (finished / "runs/tiny/report.html").stat().st_size > 10_000


def test_the_table_can_be_recomputed_from_the_saved_predictions(finished):
    results = json.loads((finished / "runs/tiny/results.json").read_text())
    row = next(row for row in results["rows"] if row["method"] == "ilrec" and row["exclude_seen"])
    again = recompute(finished / "runs/tiny/evaluation/ilrec-seed0/predictions.parquet")
    assert all(again[metric] == row[metric] for metric in METRICS)


def test_a_second_run_runs_no_stage(finished, capsys):
    before = {
        path: path.stat().st_mtime_ns for path in (finished / "runs/tiny").rglob("*.safetensors")
    }
    assert main(["run", str(finished / "c.yaml")]) == 0
    assert capsys.readouterr().out.count("unchanged, not run again") == 7
    assert before == {
        path: path.stat().st_mtime_ns for path in (finished / "runs/tiny").rglob("*.safetensors")
    }


def test_recommendations_for_new_histories(finished):
    dataset = load_dataset(finished / "runs/tiny/data")
    histories = [[dataset.item_ids[i] for i in dataset.sequence(user)] for user in range(5)]
    pq.write_table(
        pa.table({"user": [f"new{u}" for u in range(5)], "items": histories}),
        finished / "h.parquet",
    )
    allowed = sorted(
        {item for history in histories for item in history[:3]}
        | {dataset.item_ids[i] for i in range(0, 60, 2)}
    )
    (finished / "items.txt").write_text("\n".join(allowed) + "\n")
    out = finished / "out.parquet"
    argv = [
        "recommend",
        finished / "runs/tiny",
        "--histories",
        finished / "h.parquet",
        "--top",
        "4",
        "--out",
        out,
    ]
    assert main([*map(str, argv), "--exclude-seen", "--allowed", str(finished / "items.txt")]) == 0
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 20 and [row["rank"] for row in rows[:4]] == [1, 2, 3, 4]
    for row in rows:
        assert (
            row["item"] in allowed
            and row["item"] not in histories[int(row["user"].removeprefix("new"))]
            and row["title"]
        )
    scores = np.array([row["score"] for row in rows]).reshape(5, 4)
    assert (np.diff(scores) <= 0).all()


def test_recommend_decodes_as_the_model_was_trained_whatever_came_into_the_folder_later(
    finished, tmp_path
):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    dataset = load_dataset(finished / "runs/tiny/data")
    pq.write_table(
        pa.table({"user": ["a"], "items": [[dataset.item_ids[i] for i in dataset.sequence(0)]]}),
        tmp_path / "h.parquet",
    )
    found = []
    for runs in (finished / "runs", tmp_path / "runs"):
        if runs != finished / "runs":
            config = load_config(runs / "tiny/config.yaml")
            sections = {
                "backbone": {"hidden_size": 16},
                "objective": {"softmax_scope": "valid_next"},
                "train": {"max_history": 3},
                "runs_dir": str(runs),
            }
            (runs / "tiny/config.yaml").write_text(
                yaml.safe_dump(config_to_dict(config) | sections)
            )
            assert main(["prepare", str(runs / "tiny/config.yaml")]) == 0
        assert (
            main(
                [
                    "recommend",
                    str(runs / "tiny"),
                    "--histories",
                    str(tmp_path / "h.parquet"),
                    "--out",
                    str(tmp_path / "out.parquet"),
                    "launch.workers=1",
                    "launch.tp=1",
                ]
            )
            == 0
        )
        found.append(pq.read_table(tmp_path / "out.parquet"))
    assert found[0].equals(found[1])


def test_recommend_refuses_a_folder_to_write_to(finished, tmp_path, capsys):
    assert (
        main(
            [
                "recommend",
                str(finished / "runs/tiny"),
                "--histories",
                str(finished / "h.parquet"),
                "--out",
                str(tmp_path),
            ]
        )
        == 2
    )
    assert "this is a folder" in capsys.readouterr().err


def test_recommend_refuses_an_unknown_item_and_leaves_nothing(finished, capsys):
    pq.write_table(
        pa.table(
            {
                "user": ["a", "b"],
                "items": [[load_dataset(finished / "runs/tiny/data").item_ids[0]], ["nowhere"]],
            }
        ),
        finished / "bad.parquet",
    )
    assert (
        main(
            [
                "recommend",
                str(finished / "runs/tiny"),
                "--histories",
                str(finished / "bad.parquet"),
                "--out",
                str(finished / "bad-out.parquet"),
            ]
        )
        == 2
    )
    message = capsys.readouterr().err
    assert "bad.parquet" in message and "nowhere" in message and message.count("\n") == 1
    assert not (finished / "bad-out.parquet").exists()


def test_recommend_refuses_codes_that_the_model_was_not_trained_with(finished, tmp_path, capsys):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    assert (
        main(["index", str(finished / "c.yaml"), f"runs_dir={tmp_path / 'runs'}", "items.seed=7"])
        == 0
    )
    user = load_dataset(finished / "runs/tiny/data").item_ids[:3]
    pq.write_table(pa.table({"user": ["a"], "items": [list(user)]}), tmp_path / "h.parquet")
    capsys.readouterr()
    assert (
        main(["recommend", str(tmp_path / "runs/tiny"), "--histories", str(tmp_path / "h.parquet")])
        == 2
    )
    assert "trained with other item codes" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cf_models_are_trained_where_the_workers_have_gpus_and_this_process_has_none(
    finished, tmp_path, monkeypatch
):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    told: list[str] = []

    def counted(path: Path, count: Count) -> None:
        write_counter(path, count)
        told.extend(status_lines(tmp_path / "runs/tiny"))

    monkeypatch.setattr("ilrec_dist.pipeline.stages.cf.write_counter", counted)
    assert (
        main(
            [
                "cf",
                str(finished / "c.yaml"),
                f"runs_dir={tmp_path / 'runs'}",
                "launch.device=cuda",
                "cf.split_table=false",
                "cf.epochs=1",
            ]
        )
        == 0
    )
    # Meanwhile `ilrec status` says how far they are.
    assert any(line.startswith("cf: 2/3 epochs, fold0 loss ") for line in told)
    assert not (tmp_path / "runs/tiny/.cf-work").exists()


def test_a_split_table_is_trained_by_the_workers(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    before = load_file(tmp_path / "runs/tiny/cf/full.safetensors")
    # This process trains nothing itself.
    monkeypatch.setattr("ilrec_dist.pipeline.stages.cf.train_cf", None)
    assert (
        main(
            [
                "cf",
                str(finished / "c.yaml"),
                f"runs_dir={tmp_path / 'runs'}",
                "cf.epochs=1",
                "cf.seed=1",
            ]
        )
        == 0
    )
    after = load_file(tmp_path / "runs/tiny/cf/full.safetensors")
    assert after.keys() == before.keys() and not torch.equal(
        after["items.weight"], before["items.weight"]
    )
    assert not [
        path.name for path in (tmp_path / "runs/tiny").iterdir() if path.name.startswith(".cf")
    ]


def test_an_error_of_the_users_that_one_worker_meets_is_one_line(finished, tmp_path, capfd):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    damaged = tmp_path / "runs/tiny/cf/fold1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"abcd")
    assert (
        main(
            [
                "train",
                str(finished / "c.yaml"),
                f"runs_dir={tmp_path / 'runs'}",
                "train.methods=[ilrec]",
                "train.epochs=3",
            ]
        )
        == 2
    )
    assert "fold1.safetensors" in capfd.readouterr().err.strip().splitlines()[-1]
