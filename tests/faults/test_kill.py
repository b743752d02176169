"""SIGKILL a worker, the reward actor and the driver in mid-training.

The run goes on from a checkpoint and ends with the same bits.
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
from safetensors.torch import load_file

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.reporting.metrics_log import read_metrics
from tests.training.conftest import tiny_config

pytestmark = pytest.mark.slow
CHECKPOINT_STEPS = 10
# 420 steps: the worker of a killed driver trains on for some seconds, and must not reach the end
# in them.
EPOCHS = 60
PATIENCE_SECONDS = 480


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder of configurations whose runs are prepared up to the CF models.

    One of them is trained without any fault.
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
        execute(dataclasses.replace(config, name="whole"), stage)
    tree = config_to_dict(config)
    torchrun = {
        "launch": tree["launch"] | {"engine": "torchrun"},
        "cf": tree["cf"] | {"rewards": "in_process"},
    }
    for name, changes in (
        ("whole", {}),
        ("worker-and-actor", {}),
        ("driver", {}),
        ("torchrun", torchrun),
    ):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(tree | changes | {"name": name}))
        if name != "whole":
            shutil.copytree(root / "runs" / "whole", root / "runs" / name)
    run(root, "whole").wait(PATIENCE_SECONDS)
    return root


def run(root: Path, name: str, *flags: str) -> subprocess.Popen:
    log = open(root / f"{name}.log", "a")
    return subprocess.Popen(
        [sys.executable, "-m", "ilrec_dist.cli.main", "train", root / f"{name}.yaml", *flags],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def training(root: Path, name: str) -> Path:
    return root / "runs" / name / "train" / "ilrec-seed0"


def wait_for(what: str, ready: Callable[[], bool], process: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert process.poll() is None, f"the run ended (exit {process.returncode}) before {what}"
        assert time.monotonic() < until, f"no {what} within {PATIENCE_SECONDS} s"
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


def assert_same_as_whole(root: Path, name: str) -> None:
    expected, found = (
        load_file(training(root, which) / "final.safetensors") for which in ("whole", name)
    )
    assert expected.keys() == found.keys() and all(
        torch.equal(expected[key], found[key]) for key in expected
    )
    total = steps_logged(training(root, "whole"))
    lines = [line["step"] for line in read_metrics(training(root, name)) if "loss/total" in line]
    assert lines[-1] == total and lines == sorted(set(lines))


def test_a_killed_worker_and_a_killed_reward_actor_change_nothing(root):
    name = "worker-and-actor"
    process = run(root, name)
    folder = training(root, name)
    wait_for("step 30", lambda: steps_logged(folder) >= 30, process)
    (actor,) = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RewardActor" in " ".join(child.cmdline())
    ]
    actor.kill()
    wait_for("step 80 after the actor's death", lambda: steps_logged(folder) >= 80, process)
    victim = int((folder / ".lock").read_text())
    os.kill(victim, signal.SIGKILL)
    assert process.wait(PATIENCE_SECONDS) == 0, (root / f"{name}.log").read_text()[-2000:]
    assert int((folder / ".lock").read_text()) != victim
    # The training was resumed by itself, once: the actor's death did not stop it.
    ((step, dropped),) = resumptions(folder)
    assert step >= 70 and dropped <= CHECKPOINT_STEPS
    assert_same_as_whole(root, name)


def test_torchrun_workers_end_with_a_killed_driver(root):
    process = run(root, "torchrun")
    folder = training(root, "torchrun")
    wait_for("step 10", lambda: steps_logged(folder) >= 10, process)
    worker = psutil.Process(int((folder / ".lock").read_text()))
    process.kill()
    process.wait()
    # This raises when the worker goes on.
    worker.wait(60)
    assert steps_logged(folder) < steps_logged(training(root, "whole"))


def test_a_killed_driver_is_resumed(root):
    name = "driver"
    process = run(root, name)
    folder = training(root, name)
    wait_for("step 60", lambda: steps_logged(folder) >= 60, process)
    process.kill()
    process.wait()
    again = run(root, name, "--resume")
    assert again.wait(PATIENCE_SECONDS) == 0, (root / f"{name}.log").read_text()[-2000:]
    ((step, dropped),) = resumptions(folder)
    assert step >= 50 and dropped <= CHECKPOINT_STEPS
    assert_same_as_whole(root, name)
