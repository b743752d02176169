"""In mid-training a reward actor, a worker and the driver
are killed, a worker hangs, and the command is interrupted.

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
from ilrec_dist.launch.attempts import read_workers
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.testing.whole_weights import whole_weights
from tests.support.ports import reached_from_outside
from tests.support.signals import default_signals, require_ended
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow
CHECKPOINT_STEPS = 10
# The worker of a killed driver trains on for some seconds, and must not reach the end in them.
EPOCHS, LAST_STEP = 40, 280
PATIENCE_SECONDS = 480
# How often Ray Train asks the workers, and how long it waits for one that hangs at its end.
QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
}
# A worker that does not answer is given up after these.
TIMEOUT_SECONDS = 15


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder of configurations whose runs are prepared up to the CF models.

    `faulty` has Ray and a reward actor, `whole` and `torchrun` have neither.
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
        launch={
            "engine": "ray",
            "workers": 2,
            "max_failures": 20,
            "timeout_seconds": TIMEOUT_SECONDS,
        },
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
        env=os.environ | QUICK,
        start_new_session=True,
        preexec_fn=default_signals,
    )


def training(root: Path, name: str) -> Path:
    return root / "runs" / name / "train" / "ilrec-seed0"


def trainer_of(folder: Path) -> int:
    """The process that trains there."""
    return int((folder / ".lock").read_text().split()[0])


def end_of(log: Path) -> str:
    return log.read_text()[-2000:]


def wait_for(what: str, ready: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert process.poll() is None, f"exit {process.returncode} before {what}: {end_of(log)}"
        assert time.monotonic() < until, f"no {what} within {PATIENCE_SECONDS} s: {end_of(log)}"
        time.sleep(0.2)


def steps_logged(folder: Path) -> int:
    return max((line["step"] for line in read_metrics(folder) if "loss/total" in line), default=0)


def resumptions(folder: Path) -> list[tuple[int, int]]:
    """(step gone on from, logged steps dropped) of every resumption."""
    return [
        (line["step"], int(line["resumed/dropped_steps"]))
        for line in read_metrics(folder)
        if "resumed/dropped_steps" in line and line["step"] > 0
    ]


def test_faults_change_nothing(root):
    process = run(root, "faulty")
    folder, log = training(root, "faulty"), root / "faulty.log"
    wait_for("step 20", lambda: steps_logged(folder) >= 20, process, log)
    # Ray's processes, the workers and the actor.
    assert reached_from_outside(process.pid) == []
    (actor,) = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RewardActor" in " ".join(child.cmdline())
    ]
    actor.kill()
    wait_for("step 40 after the actor's death", lambda: steps_logged(folder) >= 40, process, log)
    assert not resumptions(folder)
    worker = trainer_of(folder)
    os.kill(worker, signal.SIGKILL)
    wait_for("step 80 after the worker's death", lambda: steps_logged(folder) >= 80, process, log)
    assert trainer_of(folder) != worker
    process.kill()
    process.wait()

    # A worker's death was resumed from without a command, the driver's is by the command.
    process = run(root, "faulty", "--resume")
    wait_for("resumption", lambda: len(resumptions(folder)) > 1, process, log)
    later = steps_logged(folder) + 10
    wait_for("steps of the resumed run", lambda: steps_logged(folder) >= later, process, log)
    # A worker hangs, for which the other one waits; two new ones take their places.
    hanging = read_workers(folder.parent, 2)[1]["process"]
    os.kill(hanging, signal.SIGSTOP)
    wait_for("resumption", lambda: len(resumptions(folder)) > 2, process, log)
    later = steps_logged(folder) + 10
    wait_for("steps of the new workers", lambda: steps_logged(folder) >= later, process, log)
    assert hanging not in [one["process"] for one in read_workers(folder.parent, 2)]
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_SECONDS) == 130, end_of(log)
    require_ended(children, end_of(log), "interrupted")
    assert steps_logged(folder) < LAST_STEP

    # Under torchrun the same run goes on, too.
    execute(dataclasses.replace(load_config(root / "whole.yaml"), name="faulty"), "train")
    (after_worker, _), *later_ones = found_at = resumptions(folder)
    assert len(found_at) == 4 and all(dropped <= CHECKPOINT_STEPS for _, dropped in found_at)
    assert after_worker >= 30 and all(step >= 70 for step, _ in later_ones)
    execute(load_config(root / "whole.yaml"), "train")
    expected, found = (
        whole_weights(training(root, name) / "final") for name in ("whole", "faulty")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    lines = [line["step"] for line in read_metrics(folder) if "loss/total" in line]
    assert lines[-1] == LAST_STEP and lines == sorted(set(lines))


def test_torchrun_workers_end_with_a_killed_driver(root):
    process = run(root, "torchrun")
    folder = training(root, "torchrun")
    wait_for("step 10", lambda: steps_logged(folder) >= 10, process, root / "torchrun.log")
    assert reached_from_outside(process.pid) == []
    worker = psutil.Process(trainer_of(folder))
    process.kill()
    process.wait()
    # This raises when the worker goes on.
    worker.wait(60)
    assert not (folder / "result.json").exists()
