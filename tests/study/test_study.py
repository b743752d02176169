"""A study from the command line: one table, and
what is missing from it, and nothing run twice.
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.cli.main import main
from ilrec_dist.evaluation.metrics import paired_bootstrap
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.study.cells import make_cells
from ilrec_dist.study.config import load_study
from ilrec_dist.study.state import write_state
from tests.support.one_process import write_interpreter
from tests.support.tiny_study import write_study

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 480
SETTINGS = {
    # The weights are not finite after a few steps.
    "hot": {"set": {"train.learning_rate": 1.0e30}, "seeds": [0]},
    "long": {"set": {"train.epochs": 15, "train.validate_epochs": 15}, "seeds": [0]},
}


@pytest.fixture(scope="module", autouse=True)
def _cells_of_one_process(tmp_path_factory) -> Iterator[None]:
    """A cell trains in the process of its command."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("interpreter")
        patch.setattr(sys, "executable", write_interpreter(folder / "python"))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a study whose cell `sft hot`
    diverged and whose cell `sft long` was killed.
    """
    root = tmp_path_factory.mktemp("study")
    path = write_study(root, methods=["sft"], seeds=[0, 1], settings=SETTINGS)
    output = io.StringIO()
    with ThreadPoolExecutor(1) as beside, redirect_stdout(output), redirect_stderr(output):
        killed = beside.submit(kill_in_training, root / "runs/tiny-study/shop/sft-long-seed0")
        code = main(["study", str(path)])
    killed.result()
    (root / "study.log").write_text(output.getvalue())
    assert code == 1, output.getvalue()
    return root


def kill_in_training(cell: Path) -> None:
    """Wait for the cell's first checkpoint, and kill its `ilrec run`."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not any(cell.glob("train/sft-seed0/checkpoints/step-*")):
        assert time.monotonic() < until
        time.sleep(0.05)
    (driver,) = drivers_of(cell)
    os.kill(driver, signal.SIGKILL)


def results(root: Path) -> dict:
    return json.loads((root / "runs/tiny-study/results.json").read_text())


def stamps(root: Path) -> dict[str, int]:
    """When the weights and predictions of each cell were written."""
    files = [*root.rglob("best/*.safetensors"), *root.rglob("predictions*.parquet")]
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_the_table_has_every_row_over_its_seeds(finished):
    rows = {row["row"]: row for row in results(finished)["rows"] if row["exclude_seen"]}
    assert list(rows) == ["popularity", "transitions", "sasrec", "sft", "bayes"]
    assert rows["sft"]["seeds"] == "0 1"
    values = []
    for seed in (0, 1):
        folder = finished / f"runs/tiny-study/shop/sft-seed{seed}"
        run = json.loads((folder / "results.json").read_text())
        row = next(row for row in run["rows"] if row["method"] == "sft" and row["exclude_seen"])
        values.append(row["ndcg@10"])
    assert rows["sft"]["ndcg@10"] == pytest.approx(np.mean(values))
    assert rows["sft"]["ndcg@10_std"] == pytest.approx(np.std(values, ddof=1))
    assert rows["sft"]["peak_memory_bytes"] > 2**27 and rows["sft"]["training_seconds"] > 0


def test_rows_are_compared_by_user_with_the_first_method(finished):
    folder = finished / "runs/tiny-study/shop"
    by_seed = [
        predictions_of(folder / f"sft-seed{seed}/evaluation/sft-seed{seed}") for seed in (0, 1)
    ]
    expected = paired_bootstrap(
        predictions_of(folder / "sft-seed0/evaluation/transitions"), np.mean(by_seed, axis=0)
    )
    rows = {row["row"]: row for row in results(finished)["rows"] if row["exclude_seen"]}
    found = [rows["transitions"][f"ndcg@10 - sft{end}"] for end in ("", " low", " high")]
    assert found == pytest.approx(expected)


def predictions_of(folder: Path) -> np.ndarray:
    return Predictions.load(folder / "predictions.parquet").per_user()["ndcg@10"]


def test_what_it_will_take_is_said_before_it_starts(finished):
    log = (finished / "study.log").read_text()
    estimate = log.index("estimate: 4 cells, ")
    assert "it rests on: 3 from timed steps, 1 from timed steps of other rows" in log
    assert estimate < log.index("shop/sft-seed0: done")


def test_cells_that_diverge_or_are_killed_are_missing_with_their_reasons(finished):
    cells = {cell["cell"]: cell for cell in results(finished)["cells"]}
    assert "the training has diverged" in cells["shop/sft-hot-seed0"]["missing"]
    assert cells["shop/sft-long-seed0"]["missing"].startswith("killed: by signal 9")
    done = {name for name, cell in cells.items() if cell["done"]}
    assert done == {"shop/sft-seed0", "shop/sft-seed1"}
    text = (finished / "runs/tiny-study/results.md").read_text()
    assert "Missing are 2 of 4 cells" in text and "has diverged" in text


def test_what_was_looked_at_is_kept(finished):
    cells = {cell["cell"]: cell for cell in results(finished)["cells"]}
    looked_at = cells["shop/sft-seed1"]["validations"]
    assert [one["epoch"] for one in looked_at] == [1.0, 2.0]
    best = max(one["ndcg@10"] for one in looked_at)
    assert cells["shop/sft-seed1"]["validation_ndcg@10"] == best


def test_cells_share_data_codes_and_cf_models(finished):
    study = finished / "runs/tiny-study/shop"
    for name in ("data/sequences.npy", "items/trie.npy", "cf/full.safetensors"):
        files = [study / f"sft-seed{seed}" / name for seed in (0, 1)]
        assert {file.stat().st_ino for file in files} == {(study / "shared" / name).stat().st_ino}
    assert not (study / "shared/train").exists()


def test_the_files_of_the_table_agree(finished):
    folder = finished / "runs/tiny-study"
    with open(folder / "results.csv", newline="") as file:
        *lines, _ = list(csv.DictReader(file))
    found = results(finished)["rows"]
    assert [line["row"] for line in lines] == [row["row"] for row in found]
    assert [float(line["hit@10"]) for line in lines] == [row["hit@10"] for row in found]
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 2 and "Missing cells" in page and "sft-hot-seed0" in page


def test_the_hours_of_the_cells_stand_beside_their_estimate(finished):
    """Of the two cells that are done, with one thread each."""
    study = finished / "runs/tiny-study"
    (hours,) = results(finished)["hours"]
    for stage, key in (("train sft seed {}", "training_hours"), ("evaluate", "evaluation_hours")):
        records = [
            json.loads((study / f"shop/sft-seed{s}/.stages/{stage.format(s)}.json").read_text())
            for s in (0, 1)
        ]
        assert hours[key] == pytest.approx(sum(record["seconds"] for record in records) / 3600)
    assert hours["hours_of"] == "core" and hours["cells"] == hours["estimated_cells"] == 2
    estimates = json.loads((study / ".estimates.json").read_text())
    expected = sum(estimates[f"shop/sft-seed{s}"]["seconds"] for s in (0, 1)) / 3600
    assert hours["estimated_hours"] == pytest.approx(expected)
    total = f"{hours['training_hours'] + hours['evaluation_hours']:.2f}"
    for name in ("results.md", "report.html"):
        text = (study / name).read_text()
        assert f"Its cells took {total} core-hours: " in text
        assert f"{hours['estimated_hours']:.2f} had been estimated." in text
    with open(study / "results.csv", newline="") as file:
        *_, line = csv.DictReader(file)
    assert line["row"] == "all cells" and float(line["training_hours"]) == hours["training_hours"]


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A shell's background commands, as these tests
    may be, ignore what Ctrl-C sends.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupted_study_makes_the_table_of_what_is_done(finished, capsys):
    path = write_study(finished, methods=["sft"], seeds=[0, 1], settings=SETTINGS)
    table = finished / "runs/tiny-study/results.md"
    table.unlink()

    def interrupt() -> None:
        cell = finished / "runs/tiny-study/shop/sft-long-seed0"
        until = time.monotonic() + PATIENCE_SECONDS
        while "train" not in cell.with_suffix(".log").read_text() or not drivers_of(cell):
            assert time.monotonic() < until
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as beside:
        interrupted = beside.submit(interrupt)
        assert main(["study", str(path)]) == 130
    interrupted.result()
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    cells = {cell["cell"]: cell for cell in results(finished)["cells"]}
    assert cells["shop/sft-long-seed0"]["missing"].startswith("interrupted")
    text = table.read_text()
    assert "Missing are 2 of 4 cells" in text and "| sft | 2 |" in text


def test_the_same_command_goes_on_and_a_changed_file_runs_what_changed(finished, capsys):
    before = stamps(finished)
    page = finished / "page.md"
    page.write_text("# A\n<!-- study tiny-study -->\nold\n<!-- end of study tiny-study -->\nx")
    settings = {**SETTINGS, "hot": {"set": {"train.learning_rate": 3.0e-3}, "seeds": [0]}}
    path = write_study(finished, methods=["sft"], seeds=[0, 1], settings=settings)
    assert main(["study", str(path), "--into", str(page)]) == 0
    output = capsys.readouterr().out
    assert "estimate: 2 cells" in output and "from finished cells of the same method" in output
    assert "shop/sft-hot-seed0: done" in output and "shop/sft-long-seed0: done" in output
    after = stamps(finished)
    assert {name: after[name] for name in before} == before
    training = finished / "runs/tiny-study/shop/sft-long-seed0/train/sft-seed0"
    resumed = [line for line in read_metrics(training) if "resumed/dropped_steps" in line]
    assert any(line["step"] > 0 for line in resumed)
    text = page.read_text()
    assert "| sft long | 1 |" in text and "old" not in text and text.endswith("-->\nx")

    found = results(finished)
    (choice,) = found["choices"]
    # Seed 1 has one of the settings only.
    assert choice["seeds"] == [0] and set(choice["means"]) == {"sft", "sft hot", "sft long"}
    assert choice["chosen"] == max(choice["means"], key=lambda name: choice["means"][name])
    cells = {cell["cell"]: cell["validation_ndcg@10"] for cell in found["cells"]}
    assert choice["means"]["sft hot"] == cells["shop/sft-hot-seed0"]
    chosen = {row["row"] for row in found["rows"] if row["chosen_on_validation"]}
    assert chosen == {choice["chosen"]}

    assert main(["study", str(path)]) == 0
    assert "nothing to run" in capsys.readouterr().out and stamps(finished) == after


def test_a_refused_cell_is_tried_again_on_demand_alone(finished, capsys):
    path = write_study(finished, methods=["sft"], seeds=[0, 1], settings=SETTINGS)
    (cell,) = (cell for cell in make_cells(*load_study(path)[:1], path) if cell.setting == "hot")
    write_state(cell, "refused", "the training has diverged", 1.0)
    assert main(["study", str(path)]) == 1
    output = capsys.readouterr()
    assert "nothing to run" in output.out and "with --retry" in output.err
    assert main(["study", str(path), "--retry", "--estimate"]) == 0
    assert "estimate: 1 cells" in capsys.readouterr().out


def drivers_of(cell: Path) -> list[int]:
    """The process ids of the cell's `ilrec run`: one or none."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"run" in words and f"{cell}.yaml".encode() in words:
                found.append(int(folder.name))
    return found
