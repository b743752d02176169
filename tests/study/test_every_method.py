"""A study of all methods on a shop of 60 items: every row is in its table, with all
that a row has.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ilrec_dist.cli.main import main
from ilrec_dist.objective.registry import METHODS
from tests.support.one_process import write_interpreter
from tests.support.tiny_study import write_study

pytestmark = pytest.mark.slow
BASELINES = ["popularity", "transitions", "sasrec", "gru4rec", "caser"]
ALL_METHODS = list(METHODS)
# SPRec has two epochs a round.
SMALLEST = {
    "train": {"epochs": 1},
    "preference": {"epochs": 2, "rounds": 1},
    "cf": {"epochs": 1},
    "evaluation": {"baselines": ["gru4rec", "caser"]},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished study; a cell trains in the process of its command."""
    root = tmp_path_factory.mktemp("every")
    path = write_study(root, base=SMALLEST, methods=ALL_METHODS, against=["sft", "ilrec"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", write_interpreter(root / "python"))
        assert main(["study", str(path), "--no-timing"]) == 0
    yield root / "runs/tiny-study"


def test_every_row_has_its_metrics_intervals_and_costs(study: Path) -> None:
    with open(study / "results.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["exclude_seen"]]
    names = [*BASELINES, *ALL_METHODS, "bayes"]
    for excluded in ("True", "False"):
        rows = {line["row"]: line for line in lines if line["exclude_seen"] == excluded}
        assert list(rows) == names
        for name, row in rows.items():
            assert 0 < float(row["hit@10"]) <= 1, name
            for other in {"sft", "ilrec"} - {name}:
                low, high = (float(row[f"ndcg@10 - {other} {end}"]) for end in ("low", "high"))
                assert low <= float(row[f"ndcg@10 - {other}"]) <= high, name
        costs = {name: rows[name] for name in ALL_METHODS}
        for name, row in costs.items():
            assert float(row["training_seconds"]) > 0 and row["seeds"] == "0", name
            assert float(row["peak_memory_bytes"]) > 2**27, name
            assert 0 < float(row["validation_ndcg@10"]) <= 1, name
        flops = {name: float(row["training_flops"]) for name, row in costs.items()}
        # All others have a supervised training behind them, or more layers' logits.
        assert min(flops, key=lambda name: flops[name]) == "sft"
        assert flops["simpo"] < flops["dpo"] < flops["sdpo"]
    table = (study / "results.md").read_text()
    assert "Missing" not in table
    for name in names:
        # Under both treatments.
        assert table.count(f"\n| {name} |") == 2


def test_a_training_is_made_once_for_all_cells_that_have_it(study: Path) -> None:
    """Also where it is a baseline's, or the one that others start from."""
    cells = [folder.parent for folder in study.glob("shop/*-seed0/data")]
    assert len(cells) == len(ALL_METHODS)
    for name in ("gru4rec", "caser"):
        (model,) = (study / f"shop/shared/baselines/{name}").glob("*.safetensors")
        inodes = {(cell / "baselines" / name / model.name).stat().st_ino for cell in cells}
        assert inodes == {model.stat().st_ino}
    best = [
        weights for cell in cells for weights in cell.glob("train/sft-seed0/best/*.safetensors")
    ]
    # ILRec starts from none.
    assert len(best) == len(ALL_METHODS) - 1 and len({file.stat().st_ino for file in best}) == 1
    results = json.loads((study / "results.json").read_text())
    (hours,) = results["hours"]
    trained = sum(
        json.loads((study / f"shop/{name}-seed0/.stages/train {name} seed 0.json").read_text())[
            "seconds"
        ]
        for name in ALL_METHODS
    )
    assert hours["training_hours"] == pytest.approx(trained / 3600)
