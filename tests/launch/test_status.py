"""`ilrec status`: what the run's folder tells, after restarts too."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import yaml

from ilrec_dist.cli.main import main
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.files import sha256_file, write_json
from ilrec_dist.common.manifest import with_checksum
from ilrec_dist.launch.attempts import LOST, begin_attempt, read_attempts
from ilrec_dist.launch.job import Job, run_job
from ilrec_dist.reporting.counter import Count, write_counter
from tests.support.tiny_run import tiny_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder in the middle of a training, as its workers leave it."""
    config = tiny_config(
        tmp_path, train={"methods": ["sft", "dpo"], "epochs": 4}, preference={"epochs": 2}
    )
    folder = tmp_path / "tiny"
    training = folder / "train/sft-seed0"
    kept = training / "checkpoints/step-00000020"
    kept.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    (folder / ".stages").mkdir()
    (folder / ".stages/config.sha256").write_text(sha256_file(folder / "config.yaml"))
    begun = {"fingerprint": "f", "settings": {}}
    (folder / ".stages/train sft seed 0.begun.json").write_text(json.dumps(begun))
    manifest = {"format": 4, "step": 20, "fingerprint": "f", "state": {}, "sha256": {}}
    write_json(kept / "manifest.json", with_checksum(manifest))
    now = time.time()
    lines = [
        {"step": step, "epoch": step / 25, "time": now - 100 + step, "loss/total": 3.0}
        for step in (10, 20, 30)
    ]
    (training / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def begin_stage(run: Path, name: str) -> None:
    shutil.copy(run / ".stages/train sft seed 0.begun.json", run / f".stages/{name}.begun.json")


def status(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["status", str(run)]) == 0
    return capsys.readouterr().out


def test_status_reads_the_folder_alone(run, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        begin_attempt(run / "train", run / "train/.failures")
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    assert "prepare: not begun" in text
    # Ten steps took ten seconds, and 70 of the 100 are left.
    line = r"train sft seed 0: step 30/100, loss 3\.0000, 1:10 left, last line 1:1\d ago$"
    assert re.search(line, text, re.MULTILINE)
    assert "last checkpoint: step 20, 0:0" in text
    assert "workers: 2 on 1 node (" in text and "restarts: 0" in text


def test_a_preference_training_is_as_long_as_its_own_epochs(run, capsys):
    begin_stage(run, "train dpo seed 0")
    shutil.copytree(run / "train/sft-seed0", run / "train/dpo-seed0")
    text = status(run, capsys)
    assert "train sft seed 0: step 30/100," in text
    assert re.search(r"train dpo seed 0: step 30/50, loss 3\.0000, 0:20 left", text)


def test_cf_models_and_evaluation_tell_how_far_they_are(run, capsys):
    for name in ("cf", "evaluate"):
        begin_stage(run, name)
    text = status(run, capsys)
    assert "cf: begun, not done" in text and "evaluate: begun, not done" in text
    # Two workers train CF models side by side; an older count is of something else.
    for worker, done in ((0, 3), (1, 4)):
        write_counter(run / f".cf-work/.progress.json-{worker}", Count("cf", done, 30, "full"))
    counter = run / "evaluation/.progress.json"
    write_counter(counter, Count("evaluate", 2048, 8000, "sft"))
    os.utime(counter, (time.time() - 65,) * 2)
    text = status(run, capsys)
    assert re.search(r"^cf: 7/30 epochs, full, last count 0:0\d ago$", text, re.MULTILINE)
    assert re.search(r"^evaluate: 2,048/8,000 rankings, sft, last count 1:0\d ago$", text, re.M)
    write_counter(counter, Count("baselines", 10, 80, "popularity"))
    assert "evaluate: baselines 10/80 rankings, popularity, last" in status(run, capsys)


@pytest.mark.parametrize("content", [b"", b'{"step": 20', b"{}", b"[]", b'{"step": 20}', b"\xff"])
def test_a_damaged_manifest_of_a_checkpoint_is_named(run, capsys, content):
    checkpoints = run / "train/sft-seed0/checkpoints"
    shutil.copytree(checkpoints / "step-00000020", checkpoints / "step-00000030")
    damaged = checkpoints / "step-00000030/manifest.json"
    damaged.write_bytes(content)
    assert f"  {damaged}: missing, malformed" in status(run, capsys)
    damaged.unlink()
    text = status(run, capsys)
    assert f"  {damaged}: missing, malformed" in text and "last checkpoint: step 20," in text


def test_curves_without_times_and_with_damage_are_told_as_far_as_they_go(run, capsys):
    metrics = run / "train/sft-seed0/metrics.jsonl"
    lines = [{"step": 10, "epoch": "?", "time": None}, {"step": 20}, {"step": 30, "epoch": 1.2}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = status(run, capsys)
    assert re.search(r"^train sft seed 0: step 30/100$", text, re.MULTILINE)
    metrics.write_text("no JSON\n" + metrics.read_text())
    text = status(run, capsys)
    assert f"train sft seed 0: {metrics}: line 1 is not" in text and "last checkpoint" in text


def test_notes_of_the_workers_that_are_damaged_are_left_out(run, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    begin_attempt(run / "train", run / "train/.failures")
    notes = run / "train/.attempts"
    with open(notes / "attempts.jsonl", "ab") as file:
        file.write(b'{"time": "\xff"}\n\xfe\n7\n{"time": null, "workers": 2}\n')
    for content in (b"{}", b"\xff", b""):
        (notes / "rank-0.json").write_bytes(content)
        text = status(run, capsys)
        assert re.search(r"^workers: 2, begun 0:0\d ago$", text, re.MULTILINE)
        assert "restarts: 0" in text


def test_an_error_that_nobody_foresaw_is_one_line_and_a_file(run, capsys, monkeypatch):
    def broken(_: Path) -> list[str]:
        raise KeyError("step")

    monkeypatch.setattr("ilrec_dist.cli.status.status_lines", broken)
    assert main(["status", str(run)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ilrec: error: an error that is not foreseen, KeyError: 'step'; its")
    path = Path(re.search(r"is in (\S+): please", line)[1])
    text = path.read_text()
    assert "Traceback" in text and "in broken" in text and path.stat().st_mode & 0o777 == 0o600
    path.unlink()


def test_restarts_are_listed_with_what_the_ranks_met(run, tmp_path, capsys, monkeypatch):
    job = Job("tests.support.failing:fail_otherwise", {"folder": str(tmp_path)}, str(run / "train"))
    for _ in range(2):
        with pytest.raises(ValueError):
            run_job(job)
        # The clock of a file system may be behind this process's, and the note's time before the
        # attempt's.
        os.utime(job.failures_folder / "rank-0.json", (1, 1))
    begin_attempt(run / "train", job.failures_folder)
    first, second, third = read_attempts(run / "train")
    assert not first.is_restart and second.is_restart and third.is_restart
    assert "ValueError: attempt 1" in second.reason and "ValueError: attempt 2" in third.reason
    # A worker that is killed leaves no word, and the notes are those of attempts before it.
    begin_attempt(run / "train", job.failures_folder)
    assert read_attempts(run / "train")[-1].reason == LOST
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    assert "restarts: 3" in text and "ValueError: attempt 2" in text and LOST in text
