"""A disk that fills up in a training, and one that is read-only: one line, and nothing is lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.training import checkpoint
from tests.training.conftest import tiny_config

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 240


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def train(config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ilrec_dist.cli", "train", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_line(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    return errors.strip().splitlines()[-1]


def test_a_full_disk_ends_the_run_with_one_line_and_it_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    runs = small_disk / "runs"
    train_section = {"methods": ["sft"], "epochs": 60, "checkpoint_steps": 10}
    config = tiny_config(runs, train=train_section | {"validate_epochs": 60})
    for stage in ("prepare", "index", "cf"):
        execute(config, stage)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    process, folder = train(path), runs / "tiny/train/sft-seed0"
    until = time.monotonic() + PATIENCE_SECONDS
    while not checkpoint.committed(folder / "checkpoints"):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"), open(ballast, "wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    line = last_line(process)
    assert process.returncode == 1
    assert line.startswith(f"ilrec: error: {runs}") and "No space left on device; make room" in line
    fingerprint = yaml.safe_load(
        (checkpoint.committed(folder / "checkpoints")[-1] / "manifest.json").read_text()
    )["fingerprint"]
    found, damaged = checkpoint.latest(folder / "checkpoints", fingerprint)
    assert found is not None and not damaged
    ballast.unlink()
    assert (train(path).wait(PATIENCE_SECONDS)) == 0
    resumed = [line["step"] for line in read_metrics(folder) if "resumed/dropped_steps" in line]
    assert resumed[-1] == found.step
    # The run folder's file system is read-only now.
    shutil.rmtree(runs / "tiny/train")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    process = train(path)
    line = last_line(process)
    assert process.returncode in (1, 2)
    assert line.startswith(f"ilrec: error: {runs}") and "Read-only file system" in line
