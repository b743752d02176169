"""Preference trainings: their start, their reference, resuming, and a whole run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ilrec_dist.cli.main import main
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.testing.distributed import run_distributed
from ilrec_dist.testing.whole_weights import whole_weights
from tests.support.tiny_run import losses_of, tiny_config, train_here

METHODS = ["sft", "ilrec", "dpo", "sdpo", "simpo", "rosepo", "sprec"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A whole run of the supervised and the preference methods."""
    root = tmp_path_factory.mktemp("preference")
    shutil.copytree(tiny / "tiny", root / "tiny")
    execute(preference_config(root), "run")
    return root / "tiny"


def preference_config(root: Path, **sections):
    sections = {"train": {"methods": METHODS}, "preference": {"epochs": 2, "rounds": 1}} | sections
    return tiny_config(root, **sections)


@pytest.mark.slow
def test_methods_are_in_the_results_and_the_report(run):
    results = json.loads((run / "results.json").read_text())
    versus = {(one["method"], one["versus"]) for one in results["paired_bootstrap"]}
    report = (run / "report.html").read_text()
    for method in METHODS[2:]:
        rows = [row for row in results["rows"] if row["method"] == method]
        assert len(rows) == 2 and all(0 < row["hit@10"] <= 1 for row in rows)
        assert f">{method}</th>" in report and (method, "sft") in versus
    cost = {
        row["method"]: row["training_flops"] for row in results["rows"] if row["method"] in METHODS
    }
    # Each has the supervised training behind it, one epoch with branches, and its reference.
    assert cost["sft"] < cost["simpo"] < cost["dpo"] < cost["sdpo"] < 6 * cost["sft"]
    assert "Training FLOPs" in report


@pytest.mark.slow
def test_trainings_begin_with_the_supervised_weights_which_are_the_reference(run):
    # π = π_ref at the first step, up to dropout, so DPO's loss is near log 2 there.
    lines = read_metrics(run / "train/dpo-seed0")
    assert lines[0]["loss/total"] == pytest.approx(np.log(2), abs=0.05)
    assert lines[0]["learning_rate"] <= 2e-4
    known = np.load(run / "train/dpo-seed0/reference.npy")
    several = np.load(run / "train/sdpo-seed0/reference.npy")
    assert known.shape[1] == 2 and several.shape[1] == 4
    # The first negative of a target is the same for all methods of a seed.
    np.testing.assert_allclose(several[:, :2], known, atol=1e-4)
    assert not (run / "train/simpo-seed0/reference.npy").exists()
    assert (known < 0).all() and known[:, 0].mean() > known[:, 1].mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stop_after", "kept"),
    [("sdpo", 3, ["reference"]), ("sprec", 9, ["self-play-0", "reference-0"])],
)
def test_an_interrupted_training_ends_with_the_same_bits(run, tmp_path, method, stop_after, kept):
    tree = config_to_dict(preference_config(run.parent))
    run_distributed(train_here, 1, 1, tree, method, str(tmp_path / "whole"))
    run_distributed(train_here, 1, 1, tree, method, str(tmp_path / "cut"), stop_after)
    # What was computed once is not computed again.
    files = [tmp_path / f"cut/{name}.npy" for name in kept]
    before = [file.stat().st_mtime_ns for file in files]
    run_distributed(train_here, 1, 1, tree, method, str(tmp_path / "cut"))
    assert [file.stat().st_mtime_ns for file in files] == before
    whole, cut = (whole_weights(tmp_path / name / "final") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
def test_the_layout_of_the_step_does_not_change_the_losses(run, tmp_path):
    found = []
    for world, tp, accumulation in [(1, 1, 1), (2, 2, 1), (2, 1, 3)]:
        sections = {
            "launch": {"workers": world, "tp": tp},
            "train": {"methods": ["sft", "dpo"], "accumulation_steps": accumulation},
            "preference": {"epochs": 1},
            "backbone": {"dropout": 0.0},
        }
        tree = config_to_dict(preference_config(run.parent, **sections))
        folder = tmp_path / f"{world}-{tp}"
        run_distributed(train_here, world, tp, tree, "dpo", str(folder))
        found.append(losses_of(folder))
    assert len(found[0]) > 4
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_damaged_reference_is_refused_by_name(run, tmp_path):
    tree = config_to_dict(preference_config(run.parent))
    folder = tmp_path / "cut"
    run_distributed(train_here, 1, 1, tree, "dpo", str(folder), 3)
    data = bytearray((folder / "reference.npy").read_bytes())
    data[-1] ^= 1
    (folder / "reference.npy").write_bytes(data)
    with pytest.raises(RuntimeError, match="reference.npy: damaged"):
        run_distributed(train_here, 1, 1, tree, "dpo", str(folder))


@pytest.mark.slow
def test_analyze_says_what_the_negatives_are_and_who_gains(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "tiny")
    folder = tmp_path / "tiny"
    assert main(["analyze", str(folder), "--users", "30"]) == 0
    analysis = json.loads((folder / "analysis.json").read_text())
    assert analysis["method"] == "ilrec" and len(analysis["positions"]) == 2
    for row in analysis["positions"]:
        assert row["rows"] == 30 and 0 <= row["plausible"] <= 1 and 0 <= row["in_beams"] <= 1
        assert 0 <= row["agreement/layer1"] <= 1 and row["mean_negatives"] > 0
    whole = analysis["gradients"]["all"]
    assert whole["cross_entropy"] > 0 and min(whole[term] for term in ("cpo", "cpd", "crr")) > 0
    gains = analysis["gains"]
    assert {gain["versus"] for gain in gains} == {"sft"}
    assert {gain["split"] for gain in gains} == {"popularity", "history", "collisions"}
    report = (folder / "report.html").read_text()
    assert "by position in the item, over validation targets" in report
    assert "relative to that of the" in capsys.readouterr().out
    # An analysis of other weights is not shown.
    (folder / "analysis.json").write_text(json.dumps(analysis | {"weights": "0" * 64}))
    assert main(["evaluate", str(folder / "config.yaml"), f"runs_dir={tmp_path}"]) == 0
    assert "over validation targets" not in (folder / "report.html").read_text()
    # A method without negatives is analysed as far as that goes.
    assert main(["analyze", str(folder), "--users", "30", "--method", "dpo"]) == 0
    analysis = json.loads((folder / "analysis.json").read_text())
    assert "gradients" not in analysis and "in_beams" not in analysis["positions"][0]
