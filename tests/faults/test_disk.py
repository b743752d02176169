"""A disk that fills up in a training, and one that
is read-only: one line, and nothing is lost.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from ilrec_dist.cli.main import main
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.training import checkpoint
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 240


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), open(path, "wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()


def test_a_full_disk_and_a_read_only_one_end_the_command_with_one_line(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = small_disk / "runs"
    config = tiny_config(
        runs,
        train={"methods": ["sft"], "epochs": 30, "checkpoint_steps": 10, "validate_epochs": 30},
        backbone={"num_layers": 1},
    )
    for stage in ("prepare", "index"):
        execute(config, stage)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    checkpoints = runs / "tiny/train/sft-seed0/checkpoints"

    ballast = small_disk / "ballast"

    def fill_in_training() -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not checkpoint.committed(checkpoints):
            assert time.monotonic() < until
            time.sleep(0.01)
        fill(ballast)

    with ThreadPoolExecutor(1) as beside:
        filled = beside.submit(fill_in_training)
        code = main(["train", str(path)])
    filled.result()
    errors = capsys.readouterr().err
    assert code == 1, errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith(f"ilrec: error: {runs}") and "No space left on device; make room" in line
    assert "from the last checkpoint" in line
    (newest,) = checkpoint.committed(checkpoints)[-1:]
    fingerprint = yaml.safe_load((newest / checkpoint.MANIFEST).read_text())["fingerprint"]
    found, damaged = checkpoint.latest(checkpoints, fingerprint)
    assert found is not None and not damaged

    # The file system is read-only now; this ends before any worker is asked.
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(["train", str(path)]) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"ilrec: error: {runs}") and "\n" not in line
    assert "Read-only file system; make it writable" in line

    # A new run finds no place there either; a folder that is a file is the user's own error.
    assert main(["prepare", str(path), f"runs_dir={small_disk / 'others'}"]) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"ilrec: error: {small_disk}/others") and "Read-only" in line
    assert main(["prepare", str(path), f"runs_dir={path}"]) == 2
    assert "cannot be used as the run's folder" in capsys.readouterr().err

    # There is room again.
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    ballast.unlink()
    assert main(["train", str(path)]) == 0
    resumed = [
        line["step"] for line in read_metrics(checkpoints.parent) if "resumed/dropped_steps" in line
    ]
    assert resumed[-1] == found.step
