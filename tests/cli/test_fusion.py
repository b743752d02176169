"""`ilrec recommend --fusion` serves the mixtures that the run's evaluation chose and
saved.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ilrec_dist.cli.main import main
from ilrec_dist.data.dataset import InteractionDataset, load_dataset
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.pipeline.fusion import open_fusion
from ilrec_dist.pipeline.trained_model import open_trained_model
from ilrec_dist.serving.backend import LocalBackend
from tests.support.shop import refused

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(finished: Path) -> InteractionDataset:
    return load_dataset(finished / "runs/shop/data")


@pytest.fixture(scope="module")
def histories(data: InteractionDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the test split lets a model see of each user."""
    path = tmp_path_factory.mktemp("fusion") / "histories.parquet"
    items = [[data.item_ids[i] for i in data.sequence(u)[:-1]] for u in range(data.num_users)]
    users = [data.user_ids[user] for user in range(data.num_users)]
    pq.write_table(pa.table({"user": users, "items": items}), path)
    return path


def saved(run: Path, fusion: str, exclude_seen: bool) -> Predictions:
    name = "predictions" if exclude_seen else "predictions-seen-kept"
    return Predictions.load(run / f"evaluation/sft+{fusion}-seed0/{name}.parquet")


def recommended(run: Path, histories: Path, out: Path, *flags: str) -> pa.Table:
    argv = ["recommend", str(run), "--histories", str(histories), "--out", str(out), *flags]
    assert main(argv) == 0
    return pq.read_table(out)


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("fusion", ["cf", "cf+transitions"])
def test_the_lists_are_those_that_the_evaluation_saved(
    finished: Path,
    data: InteractionDataset,
    histories: Path,
    tmp_path: Path,
    fusion: str,
    exclude_seen: bool,
) -> None:
    run, expected = finished / "runs/shop", saved(finished / "runs/shop", fusion, exclude_seen)
    flags = ["--exclude-seen"] if exclude_seen else []
    table = recommended(run, histories, tmp_path / "out.parquet", "--fusion", fusion, *flags)
    top = expected.items[:, :10]
    ids = [data.item_ids[item] for item in top[top >= 0]]
    assert table.column("item").to_pylist() == ids and len(ids) > 100
    np.testing.assert_allclose(
        table.column("score").to_numpy(), expected.scores[:, :10][top >= 0], rtol=1e-5
    )
    assert (np.exp(expected.scores).sum(axis=1) < 1 + 1e-5).all()
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert all(0 <= row["calibration_error"] < 1 for row in rows)
    if fusion == "cf+transitions":
        widest = recommended(run, histories, tmp_path / "out.parquet", "--fusion", *flags)
        assert widest.equals(table)


def test_only_allowed_items_are_listed_in_the_same_order(
    finished: Path, histories: Path, tmp_path: Path
) -> None:
    run, out = finished / "runs/shop", tmp_path / "out.parquet"
    everything = recommended(run, histories, out, "--fusion", "--top", "20").to_pylist()
    allowed = {"3", "5", "8", "13"}
    (tmp_path / "allowed.txt").write_text("\n".join(allowed))
    flags = ["--fusion", "--allowed", str(tmp_path / "allowed.txt")]
    rows = recommended(run, histories, out, *flags).to_pylist()
    expected = [(row["user"], row["item"]) for row in everything if row["item"] in allowed]
    assert [(row["user"], row["item"]) for row in rows] == expected


def test_the_server_answers_with_the_same_lists(finished: Path, data: InteractionDataset) -> None:
    run = finished / "runs/shop"
    histories = [[data.item_ids[item] for item in data.sequence(user)[:-1]] for user in range(5)]
    with open_trained_model(run) as trained:
        backend = LocalBackend(open_fusion(trained), trained.artifacts.dataset)
        for exclude_seen in (True, False):
            lists = backend.recommend(histories, 10, exclude_seen)
            expected = saved(run, "cf+transitions", exclude_seen).items[:5, :10]
            for items, wanted in zip(lists, expected, strict=True):
                assert [item.item for item in items] == [
                    data.item_ids[item] for item in wanted[wanted >= 0]
                ]


def test_a_fusion_that_is_not_there_is_refused(
    shop: Path, histories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["recommend", shop / "runs/shop", "--histories", histories, "--fusion"]
    assert "expected cf or cf+transitions" in refused(capsys, *argv, "bayes")
    (shop / "runs/shop/.stages/evaluate.json").unlink()
    for value in ([], ["cf"]):
        line = refused(capsys, *argv, *value)
        assert "has no fusion of sft seed 0" in line and "evaluation.fusion=true" in line
