"""SIGTERM ends a training under torchrun with a checkpoint,
one line and its exit code, and leaves no process.

test_kill.py ends one under Ray so.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.pipeline.prompting import epoch_steps
from ilrec_dist.reporting.metrics_log import read_metrics
from tests.support.commands import Commands
from tests.support.signals import require_ended
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 240
EPOCH_STEPS = 606


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest committed checkpoint; 0 where there is none."""
    steps = [int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoints/step-*")]
    return max(steps, default=0)


def test_sigterm_writes_a_checkpoint_and_ends_the_command_with_one_line(
    commands: Commands, tmp_path: Path
) -> None:
    # Checkpoints are due at the ends of epochs alone.
    train = {"methods": ["sft"], "epochs": 100, "batch_size": 1, "max_history": 1}
    config = tiny_config(tmp_path / "runs", train=train | {"checkpoint_steps": 1_000_000})
    for stage in ("prepare", "index"):
        execute(config, stage)
    assert epoch_steps(config, RunArtifacts(config)) == EPOCH_STEPS
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    log = config.run_dir / "train/sft-seed0/metrics.jsonl"
    process = commands.start(
        [sys.executable, "-m", "ilrec_dist.cli", "train", str(tmp_path / "c.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + PATIENCE_SECONDS
    while not (log.exists() and log.stat().st_size > 0):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 143, errors
    # It ended where it logs, every ten steps, and before another checkpoint was due.
    newest = newest_checkpoint(log.parent)
    assert newest == read_metrics(log.parent)[-1]["step"]
    assert 0 < newest < EPOCH_STEPS
    # torchrun's own process may abort at its end on a busy machine, and says so.
    require_ended(children, errors, "terminated", may_trace=True)
