"""SIGKILL `ilrec cf`, or one of its workers, after the first model: the others are
trained, and no more.

The models are those of a run that was not killed. The workers of a killed command end.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from ray.cluster_utils import Cluster

from ilrec_dist.cf.sasrec.cross_fit import train_cf
from ilrec_dist.cf.sasrec.sharded_table import ItemShard
from ilrec_dist.cli.main import main
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.files import sha256_file
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.launch.attempts import read_workers
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.commands import Commands
from tests.support.nodes import BARE_HEAD, QUICK
from tests.support.ports import reached_from_outside
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 120


# The worker with one model has it when the other one has not got two.
CF = {"epochs": 25, "patience": 25}


def train_whole(mesh: Mesh, tree: dict, out: str) -> None:
    """As the workers of `ilrec cf` do, in processes that are there already."""
    torch.set_num_threads(tree["launch"]["threads"])
    artifacts = RunArtifacts(config_from_dict(tree))
    shard = ItemShard.of_process_group(artifacts.training.num_items)
    train_cf(artifacts.config.cf, artifacts.training, None, out, shard=shard)


def test_a_killed_cf_stage_goes_on_with_the_models_it_had_finished(
    commands: Commands, tmp_path: Path
) -> None:
    # As many epochs as the workers of a killed driver cannot get through before they end.
    config = tiny_config(
        tmp_path / "runs",
        cf={"epochs": 20, "patience": 20, "split_table": True},
        launch={"workers": 2, "tp": 1},
    )
    config = dataclasses.replace(config, name="killed")
    run = config.run_dir
    for stage in ("prepare", "index"):
        execute(config, stage)
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    process = commands.start(
        [sys.executable, "-m", "ilrec_dist.cli.main", "cf", tmp_path / "killed.yaml"],
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + PATIENCE_SECONDS
    while not (run / ".cf.unfinished/full.json").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    workers = [psutil.Process(one["process"]) for one in read_workers(run / ".cf-work", 2)]
    assert reached_from_outside(process.pid) == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    # This raises when a worker goes on.
    for worker in workers:
        worker.wait(PATIENCE_SECONDS)
    finished = (run / ".cf.unfinished/cf/full.safetensors").stat().st_mtime_ns
    assert not (run / "cf").exists()
    execute(config, "cf")
    assert (run / "cf/full.safetensors").stat().st_mtime_ns == finished
    run_distributed(train_whole, 2, 1, config_to_dict(config), str(tmp_path / "whole"))
    for name in ("full", "fold0", "fold1"):
        assert sha256_file(run / f"cf/{name}.safetensors") == sha256_file(
            tmp_path / f"whole/{name}.safetensors"
        )
    assert not [path.name for path in run.iterdir() if path.name.startswith(".cf")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("warm_ray")
def test_a_killed_worker_and_ctrl_c_lose_only_what_was_not_finished_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, **BARE_HEAD},
    )
    config = tiny_config(
        tmp_path,
        cf=CF,
        launch={"engine": "ray", "workers": 2, "ray_address": cluster.address},
    )
    run, killed = config.run_dir, []
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    finished = run / ".cf.unfinished/cf/fold0.safetensors"

    def worker() -> int:
        return int(read_workers(run / ".cf-work", 2)[0]["process"])

    def kill() -> None:
        """Kill the first worker, which has two models, when the second has its only
        one, and interrupt the command when there is another one.
        """
        until = time.monotonic() + PATIENCE_SECONDS
        while not (run / ".cf.unfinished/fold0.json").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        killed.append(finished.stat().st_mtime_ns)
        assert not (run / ".cf.unfinished/fold1.json").exists()
        first = worker()
        os.kill(first, signal.SIGKILL)
        while worker() == first:
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background jobs ignore it.
    on_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for stage in ("prepare", "index"):
            execute(config, stage)
        killer = threading.Thread(target=kill)
        killer.start()
        assert main(["cf", str(path)]) == 130
        killer.join()
        line = "ilrec: interrupted; the same command goes on where it stopped"
        assert capsys.readouterr().err.strip().splitlines()[-1] == line
        assert not (run / "cf").exists()
        assert main(["cf", str(path)]) == 0
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        cluster.shutdown()
    assert killed == [(run / "cf/fold0.safetensors").stat().st_mtime_ns]
    alone = tiny_config(tmp_path / "alone", cf=CF)
    for stage in ("prepare", "index", "cf"):
        execute(alone, stage)
    for name in ("full", "fold0", "fold1"):
        assert sha256_file(run / f"cf/{name}.safetensors") == sha256_file(
            alone.run_dir / f"cf/{name}.safetensors"
        )
    assert not [path.name for path in run.iterdir() if path.name.startswith(".cf")]
