"""SIGKILL a reward actor, a worker and the driver in mid-training.

The run goes on from a checkpoint and ends with the bits of a run without any fault.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.config.load import load_config
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.testing.whole_weights import whole_weights
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow
CHECKPOINT_STEPS = 10
# 280 steps: the worker of a killed driver trains on for some seconds, and must not reach the end
# in them.
EPOCHS = 40
PATIENCE_SECONDS = 480


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder of configurations whose runs are prepared up to the CF models.

    `faulty` has Ray and a reward actor, `torchrun` and `whole` have neither.
    """
    root = tmp_path_factory.mktemp("faults")
    config = tiny_config(
        root / "runs",
        train={
            "epochs": EPOCHS,
            "checkpoint_steps": CHECKPOINT_STEPS,
            "methods": ["ilrec"],
            "validate_epochs": EPOCHS,
        },
        launch={"engine": "ray", "workers": 1, "tp": 1, "threads": 1, "device": "cpu"},
        cf={"rewards": "actor"},
    )
    for stage in ("prepare", "index", "cf"):
        execute(dataclasses.replace(config, name="faulty"), stage)
    tree = config_to_dict(config)
    torchrun = {
        "launch": tree["launch"] | {"engine": "torchrun"},
        "cf": tree["cf"] | {"rewards": "in_process"},
    }
    for name, changes in (("faulty", {}), ("whole", torchrun), ("torchrun", torchrun)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(tree | changes | {"name": name}))
        if name != "faulty":
            shutil.copytree(root / "runs" / "faulty", root / "runs" / name)
    return root


def run(root: Path, name: str, *flags: str) -> subprocess.Popen:
    log = open(root / f"{name}.log", "a")
    return subprocess.Popen(
        [sys.executable, "-m", "ilrec_dist.cli", "train", root / f"{name}.yaml", *flags],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def training(root: Path, name: str) -> Path:
    return root / "runs" / name / "train" / "ilrec-seed0"


def end_of(log: Path) -> str:
    return log.read_text()[-2000:]


def wait_for(what: str, ready: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert process.poll() is None, f"exit {process.returncode} before {what}: {end_of(log)}"
        assert time.monotonic() < until, f"no {what} within {PATIENCE_SECONDS} s: {end_of(log)}"
        time.sleep(0.05)


def steps_logged(folder: Path) -> int:
    return max((line["step"] for line in read_metrics(folder) if "loss/total" in line), default=0)


def resumptions(folder: Path) -> list[tuple[int, int]]:
    """(step gone on from, logged steps dropped) of every resumption."""
    return [
        (line["step"], int(line["resumed/dropped_steps"]))
        for line in read_metrics(folder)
        if "resumed/dropped_steps" in line and line["step"] > 0
    ]


def test_a_killed_actor_worker_and_driver_change_nothing(root):
    process = run(root, "faulty")
    folder, log = training(root, "faulty"), root / "faulty.log"
    wait_for("step 20", lambda: steps_logged(folder) >= 20, process, log)
    (actor,) = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RewardActor" in " ".join(child.cmdline())
    ]
    actor.kill()
    wait_for("step 40 after the actor's death", lambda: steps_logged(folder) >= 40, process, log)
    assert not resumptions(folder)
    worker = int((folder / ".lock").read_text())
    os.kill(worker, signal.SIGKILL)
    wait_for("step 80 after the worker's death", lambda: steps_logged(folder) >= 80, process, log)
    assert int((folder / ".lock").read_text()) != worker
    process.kill()
    process.wait()
    assert steps_logged(folder) < 200
    again = run(root, "faulty", "--resume")
    assert again.wait(PATIENCE_SECONDS) == 0, end_of(log)
    # The worker's death was resumed from without a command, the driver's by the command.
    (after_worker, dropped_first), (after_driver, dropped_second) = resumptions(folder)
    assert after_worker >= 30 and dropped_first <= CHECKPOINT_STEPS
    assert after_driver >= 70 and dropped_second <= CHECKPOINT_STEPS

    execute(load_config(root / "whole.yaml"), "train")
    expected, found = (
        whole_weights(training(root, name) / "final") for name in ("whole", "faulty")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    lines = [line["step"] for line in read_metrics(folder) if "loss/total" in line]
    assert lines[-1] == steps_logged(training(root, "whole")) and lines == sorted(set(lines))


def test_torchrun_workers_end_with_a_killed_driver(root):
    process = run(root, "torchrun")
    folder = training(root, "torchrun")
    wait_for("step 10", lambda: steps_logged(folder) >= 10, process, root / "torchrun.log")
    worker = psutil.Process(int((folder / ".lock").read_text()))
    process.kill()
    process.wait()
    # This raises when the worker goes on.
    worker.wait(60)
    assert not (folder / "result.json").exists()
