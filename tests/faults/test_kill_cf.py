"""SIGKILL `ilrec cf` after its first model: run again it trains the others only, and the models are those of a run that was not killed."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.files import sha256_file
from ilrec_dist.pipeline.execute import execute
from tests.training.conftest import tiny_config

PATIENCE_SECONDS = 120


def test_a_killed_cf_stage_goes_on_with_the_models_it_had_finished(tmp_path: Path) -> None:
    # as many epochs as the workers of a killed driver cannot get through before they end
    settings = {
        "cf": {"epochs": 30, "patience": 30, "split_table": True},
        "launch": {"workers": 2, "tp": 1},
    }
    whole = tiny_config(tmp_path / "runs", **settings)
    killed = dataclasses.replace(whole, name="killed")
    for config in (whole, killed):
        execute(config, "prepare")
        execute(config, "index")
    execute(whole, "cf")
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(config_to_dict(killed)))
    process = subprocess.Popen(
        [sys.executable, "-m", "ilrec_dist.cli.main", "cf", tmp_path / "killed.yaml"],
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + PATIENCE_SECONDS
    while not (killed.run_dir / ".cf.unfinished/full.json").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = (killed.run_dir / ".cf.unfinished/cf/full.safetensors").stat().st_mtime_ns
    assert not (killed.run_dir / "cf").exists()
    execute(killed, "cf")
    assert (killed.run_dir / "cf/full.safetensors").stat().st_mtime_ns == finished
    for name in ("full", "fold0", "fold1"):
        assert sha256_file(killed.run_dir / f"cf/{name}.safetensors") == sha256_file(
            whole.run_dir / f"cf/{name}.safetensors"
        )
    assert not [path.name for path in killed.run_dir.iterdir() if path.name.startswith(".cf")]
