"""In mid-training a reward actor and the driver are killed,
a worker hangs, and the command is terminated.

The run goes on from a checkpoint and has the bits of a run without any fault.
tests/launch/test_nodes.py kills workers, with the node they are on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.stop_request import StopRequest
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.config.tree import Config
from ilrec_dist.launch.attempts import read_workers
from ilrec_dist.launch.job import FOR_WORKERS
from ilrec_dist.pipeline.execute import execute, open_run
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.testing.distributed import run_distributed
from ilrec_dist.training import checkpoint
from tests.support.commands import Commands
from tests.support.ports import reached_from_outside
from tests.support.signals import require_ended
from tests.support.tiny_run import tiny_config, train_here

pytestmark = pytest.mark.slow
CHECKPOINT_STEPS = 10
PATIENCE_SECONDS = 480
# How often Ray Train asks the workers, and how long it waits for one that hangs at its end.
QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
}
# A worker that does not answer is given up after these, in which a reward actor must load on a busy
# machine too.
TIMEOUT_SECONDS = 25


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a run under Ray with a reward actor, which is prepared up to the CF models."""
    config = tiny_config(
        tmp_path / "runs",
        # It is ended before its last step. Steps are short; epochs, at whose ends checkpoints are
        # due, are long.
        train={
            "methods": ["ilrec"],
            "epochs": 1000,
            "validate_epochs": 1000,
            "batch_size": 2,
            "max_history": 1,
            "checkpoint_steps": CHECKPOINT_STEPS,
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
        execute(config, stage)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    return config


def run(commands: Commands, root: Path, *words: str) -> subprocess.Popen:
    with open(root / "log", "a") as log:
        return commands.start(
            [sys.executable, "-m", "ilrec_dist.cli", "train", root / "config.yaml", *words],
            stdout=log,
            stderr=log,
            env={key: value for key, value in os.environ.items() if key not in FOR_WORKERS} | QUICK,
        )


def end_of(log: Path) -> str:
    return log.read_text()[-2000:]


def wait_for(what: str, ready: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert process.poll() is None, f"exit {process.returncode} before {what}: {end_of(log)}"
        assert time.monotonic() < until, f"no {what} within {PATIENCE_SECONDS} s: {end_of(log)}"
        time.sleep(0.2)


def newest_checkpoint(folder: Path) -> dict[str, Any]:
    """Its manifest."""
    (newest,) = checkpoint.committed(folder / "checkpoints")[-1:]
    return json.loads((newest / checkpoint.MANIFEST).read_text())


def steps_logged(folder: Path) -> int:
    return max((line["step"] for line in read_metrics(folder) if "loss/total" in line), default=0)


def resumptions(folder: Path) -> list[tuple[int, int]]:
    """(step gone on from, logged steps dropped) of every resumption."""
    return [
        (line["step"], int(line["resumed/dropped_steps"]))
        for line in read_metrics(folder)
        if "resumed/dropped_steps" in line and line["step"] > 0
    ]


def test_faults_change_nothing(config: Config, commands: Commands, tmp_path: Path) -> None:
    folder, log = config.run_dir / "train/ilrec-seed0", tmp_path / "log"

    def wait_for_attempt(count: int) -> None:
        """Wait until the training has gone on from a checkpoint so many times."""
        wait_for(f"resumption {count}", lambda: len(resumptions(folder)) >= count, process, log)
        later = steps_logged(folder) + 10
        wait_for("its steps", lambda: steps_logged(folder) >= later, process, log)

    process = run(commands, tmp_path)
    wait_for("step 20", lambda: steps_logged(folder) >= 20, process, log)
    # Ray's processes, the workers and the actor.
    assert reached_from_outside(process.pid) == []
    for worker in read_workers(folder.parent, 2):
        started_with = psutil.Process(worker["process"]).environ()
        assert FOR_WORKERS.items() <= started_with.items()
        # Those that Ray gave no GPU see none.
        assert started_with.get("CUDA_VISIBLE_DEVICES") == ""
    (actor,) = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RewardActor" in " ".join(child.cmdline())
    ]
    actor.kill()
    wait_for("step 40 after the actor's death", lambda: steps_logged(folder) >= 40, process, log)
    assert not resumptions(folder)
    # A worker hangs, for which the other one waits; two new ones take their places.
    hanging = read_workers(folder.parent, 2)[1]["process"]
    os.kill(hanging, signal.SIGSTOP)
    wait_for_attempt(1)
    assert hanging not in [one["process"] for one in read_workers(folder.parent, 2)]
    process.kill()
    process.wait()

    # From a hanging worker the run went on without a command, from the driver's death it does with
    # one. That ends with a checkpoint, although none is due.
    process = run(commands, tmp_path, "--resume", "train.checkpoint_steps=1000000")
    wait_for_attempt(2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == 143, log.read_text()
    require_ended(children, log.read_text(), "terminated")
    ended_at = newest_checkpoint(folder)["step"]
    assert ended_at == read_metrics(folder)[-1]["step"]

    # Under torchrun the same run goes on, too.
    tree = config_to_dict(config)
    tree["launch"]["engine"], tree["cf"]["rewards"] = "torchrun", "in_process"
    stages = open_run(config_from_dict(tree))
    (name,) = (name for name, stage in stages.stages.items() if stage.training is not None)
    fingerprint = stages.fingerprint(name)
    StopRequest(folder.parent).clear()
    last = (ended_at // CHECKPOINT_STEPS + 2) * CHECKPOINT_STEPS
    for place in (folder, tmp_path / "whole"):
        run_distributed(train_here, 2, 1, tree, "ilrec", str(place), last, None, fingerprint)
    found_at = resumptions(folder)
    assert len(found_at) == 3 and all(dropped <= CHECKPOINT_STEPS for _, dropped in found_at)
    assert all(step >= 30 for step, _ in found_at)
    found, expected = newest_checkpoint(folder), newest_checkpoint(tmp_path / "whole")
    assert found["step"] == expected["step"] == last
    # Parameters and moments.
    assert len(expected["sha256"]) == 2 and found["sha256"] == expected["sha256"]
    lines = [line["step"] for line in read_metrics(folder) if "loss/total" in line]
    assert lines[-1] == last and lines == sorted(set(lines))
