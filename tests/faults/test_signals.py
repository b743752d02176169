"""SIGTERM ends a training with a checkpoint, one
line and its exit code, and leaves no process.
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
from tests.support.signals import require_ended
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 240
EPOCH_STEPS = 606


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a configuration for each engine,
    whose run is prepared up to the CF models.
    """
    root = tmp_path_factory.mktemp("signals")
    # Checkpoints are due at the ends of epochs alone.
    train = {"methods": ["sft"], "epochs": 100, "batch_size": 1, "max_history": 1}
    config = tiny_config(root / "runs", train=train | {"checkpoint_steps": 1_000_000})
    for stage in ("prepare", "index", "cf"):
        execute(config, stage)
    assert epoch_steps(config, RunArtifacts(config)) == EPOCH_STEPS
    tree = config_to_dict(config)
    for engine in ("ray", "torchrun"):
        changed = tree | {"launch": tree["launch"] | {"engine": engine}}
        (root / f"{engine}.yaml").write_text(yaml.safe_dump(changed))
    return root


def newest_checkpoint(root: Path) -> int:
    """The step of the newest committed checkpoint; 0 where there is none."""
    folder = root / "runs/tiny/train/sft-seed0/checkpoints"
    steps = [int(path.name.rpartition("-")[2]) for path in folder.glob("step-*")]
    return max(steps, default=0)


@pytest.mark.parametrize("engine", ["ray", "torchrun"])
def test_sigterm_writes_a_checkpoint_and_ends_the_command_with_one_line(prepared, engine):
    log = prepared / "runs/tiny/train/sft-seed0/metrics.jsonl"
    before, saved = log.stat().st_size if log.exists() else 0, newest_checkpoint(prepared)
    process = subprocess.Popen(
        [sys.executable, "-m", "ilrec_dist.cli", "train", str(prepared / f"{engine}.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + PATIENCE_SECONDS
    while not (log.exists() and log.stat().st_size > before):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 143, errors
    # It ended where it logs, every ten steps, and before another checkpoint was due.
    newest = newest_checkpoint(prepared)
    assert newest == read_metrics(log.parent)[-1]["step"]
    assert saved < newest < saved + EPOCH_STEPS
    # torchrun's own process may abort at its end on a busy machine, and says so.
    require_ended(children, errors, "terminated", may_trace=engine == "torchrun")
