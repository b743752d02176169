"""The metrics in MLflow and Weights & Biases, by the libraries themselves, without a
server: MLflow's file store, and W&B offline.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import platform
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.reporting.metrics_log import MetricsLog, read_metrics
from ilrec_dist.reporting.trackers import close_within, require_tracker
from ilrec_dist.testing.distributed import run_distributed
from tests.support.tiny_run import tiny_config, train_here

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 20


def needs(name: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(absent, reason=f"{name} is not installed")


def log_twice(folder, tracker):
    """A training that is ended after step 30 and goes on from step 20."""
    log = MetricsLog(folder, 0, tracker)
    for step in (10, 20, 30):
        log.write(step, step / 10, {"negatives/mean": step, "negatives/mean/pos0": math.nan})
    log.close(finished=False)
    with MetricsLog(folder, 20, tracker) as log:
        for step in (30, 40):
            log.write(step, step / 10, {"negatives/mean": 2 * step, "negatives/mean/pos0": 1.0})


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_library_that_is_not_installed_is_one_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"train.tracker {name}: .* `pip install {name}"):
        require_tracker(name)


def test_it_is_said_before_workers_start(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "runs")
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = tiny_config(tmp_path / "runs", train={"tracker": "wandb"})
    with pytest.raises(UserError, match="train.tracker wandb: its library is not installed"):
        execute(config, "train")
    assert not (config.run_dir / "train").exists()


def test_the_end_of_a_training_waits_for_no_server(tmp_path):
    class Waiting:
        run_id = "a"

        def write(self, step, values):
            raise AssertionError

        def close(self, finished):
            threading.Event().wait()

    with pytest.raises(TimeoutError, match="not all was handed over within 0.1 s"):
        close_within(Waiting(), True, 0.1)


def wandb_files(folder, keys):
    """The files of all attempts, after all keys are in them.

    The library's own process writes the last of them right after `finish` has returned.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
        content = b"".join(path.read_bytes() for path in files)
        if all(key.encode() in content for key in keys):
            return files
        assert time.monotonic() < until, keys
        time.sleep(0.05)


def train_offline(mesh, tree, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        train_here(mesh, tree, "sft", folder)


@needs("wandb")
def test_a_training_hands_over_what_it_logs(tiny, tmp_path):
    config = tiny_config(tiny, train={"tracker": "wandb", "epochs": 1})
    folder = tmp_path / "tiny/train/sft-seed0"
    run_distributed(train_offline, 1, 1, config_to_dict(config), str(folder))
    keys = {
        key for line in read_metrics(folder) for key, value in line.items() if value is not None
    }
    assert len(keys) > 20 and len(wandb_files(folder, keys - {"time"})) == 1


@needs("mlflow")
def test_mlflow_has_one_run_that_goes_on_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log_twice(tmp_path / "tiny/train/sft-seed0", "mlflow")
    client = importlib.import_module("mlflow").MlflowClient()
    experiment = client.get_experiment_by_name("tiny")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "sft-seed0" and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "negatives/mean")
    # The step that was run again is there twice.
    assert sorted((entry.step, entry.value) for entry in history) == [
        (10, 10.0),
        (20, 20.0),
        (30, 30.0),
        (30, 60.0),
        (40, 80.0),
    ]
    history = client.get_metric_history(run.info.run_id, "negatives/mean.pos0")
    assert sorted((entry.step, entry.value) for entry in history) == [(30, 1.0), (40, 1.0)]


@needs("mlflow")
def test_a_server_that_cannot_be_reached_is_one_line_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        UserError, match="train.tracker mlflow: no run can be begun there .*127"
    ) as e:
        MetricsLog(tmp_path / "tiny/train/sft-seed0", 0, "mlflow")
    assert "\n" not in str(e.value)


@needs("wandb")
def test_wandb_has_one_run_that_goes_on_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "tiny/train/sft-seed0"
    log_twice(folder, "wandb")
    name = json.loads((folder / ".tracked-run.json").read_text())["run"]
    keys = {"negatives/mean", "negatives/mean/pos0", "sft-seed0", "tiny"}
    assert {path.name for path in wandb_files(folder, keys)} == {f"run-{name}.wandb"}


@needs("wandb")
def test_wandb_gets_nothing_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOSTNAME", "a-secret-host")
    monkeypatch.setattr(socket, "gethostname", lambda: "a-secret-host")
    monkeypatch.setattr(sys, "argv", ["/secret/program", "a-secret-word"])
    folder = tmp_path / "tiny/train/sft-seed0"
    with MetricsLog(folder, 0, "wandb") as log:
        log.write(10, 1.0, {"loss/total": 3.0})
    (file,) = wandb_files(folder, {"loss/total"})
    content = file.read_bytes()
    secrets = ["secret", str(tmp_path), str(Path.cwd()), platform.platform(), "memory_percent"]
    assert [word for word in secrets if word.encode() in content] == []
    assert not list(file.parent.glob("files/*"))


@needs("wandb")
def test_a_tracker_that_fails_later_ends_no_training(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricsLog(tmp_path / "tiny/train/sft-seed0", 0, "wandb") as log:
        log.write(10, 1.0, {"loss/total": 3.0})
        # The library's own run is over, as after its process was killed.
        importlib.import_module("wandb").finish()
        for step in (20, 30):
            log.write(step, 2.0, {"loss/total": 2.0})
    assert [line["step"] for line in read_metrics(log.folder)] == [10, 20, 30]
    (line,) = (line for line in capfd.readouterr().out.splitlines() if "warning" in line)
    assert line.startswith("warning: train.tracker: ") and line.endswith("it gets nothing more")
