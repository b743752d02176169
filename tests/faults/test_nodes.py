"""Two Ray nodes with a spare: dp over nodes, tp on each; a hanging rank, lost nodes, fewer workers.

One run goes through all of it, because each start of four workers takes its time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from ray.cluster_utils import Cluster

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.launch.attempts import read_attempts, read_workers
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.reporting.metrics_log import read_metrics
from tests.training.conftest import tiny_config

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
PATIENCE_SECONDS = 240
TIMEOUT_SECONDS = 40
ROOT = Path(__file__).parents[2]


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head without CPUs, and three nodes of two."""
    # A dead node is found out in a second.
    soon = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 200,
        "health_check_failure_threshold": 5,
    }
    size = {"num_cpus": 2, "object_store_memory": 100 << 20}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": 1 << 27})
    try:
        for _ in range(3):
            cluster.add_node(**size)
        yield cluster
    finally:
        cluster.shutdown()


class Run:
    """An `ilrec train` on the cluster, and what its folder says."""

    def __init__(self, config: Path, folder: Path, address: str, *settings: str) -> None:
        self.trainings = folder / "train"
        self.log = config.with_suffix(".log")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ilrec_dist.cli", "train", str(config)]
            + [f"launch.ray_address={address}", *settings],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
            stdout=open(self.log, "w"),
            stderr=subprocess.STDOUT,
        )

    def text(self) -> str:
        return self.log.read_text()

    def steps(self) -> list[int]:
        lines = read_metrics(self.trainings / "sft-seed0")
        return [line["step"] for line in lines if "loss/total" in line]

    def wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.text()}"
            assert time.monotonic() < until, f"no {what}:\n{self.text()}"
            time.sleep(0.1)

    def wait_for_attempt(self, number: int) -> list[int]:
        """The process ids by rank of that attempt, once it has logged a step."""
        self.wait_for(f"attempt {number}", lambda: len(read_attempts(self.trainings)) >= number)
        before = len(self.steps())
        self.wait_for(f"a step of attempt {number}", lambda: len(self.steps()) > before)
        workers = read_workers(self.trainings, read_attempts(self.trainings)[-1].workers)
        # The ranks of a tensor-parallel group are on one node.
        assert [worker["node"] for worker in workers[::2]] == [w["node"] for w in workers[1::2]]
        return [worker["process"] for worker in workers]


def lose_node_of(cluster: Cluster, process: int) -> None:
    ancestors = {parent.pid for parent in psutil.Process(process).parents()}
    (node,) = (
        node
        for node in cluster.worker_nodes
        if ancestors & {info.process.pid for info in node.all_processes["raylet"]}
    )
    cluster.remove_node(node, allow_graceful=False)


def test_a_run_survives_a_hanging_rank_and_a_lost_node_and_says_when_no_node_is_left(
    nodes: Cluster, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path / "runs",
        train={"methods": ["sft"], "epochs": 5000, "checkpoint_steps": 20, "validate_epochs": 5000},
        launch={"engine": "ray", "workers": 4, "tp": 2, "timeout_seconds": TIMEOUT_SECONDS},
    )
    for stage in ("prepare", "index", "cf"):
        execute(config, stage)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    run = Run(path, config.run_dir, nodes.address)
    processes = run.wait_for_attempt(1)
    assert len(processes) == 4

    os.kill(processes[3], signal.SIGSTOP)
    processes = run.wait_for_attempt(2)

    lose_node_of(nodes, processes[2])
    processes = run.wait_for_attempt(3)
    assert [attempt.is_restart for attempt in read_attempts(run.trainings)] == [False, True, True]

    lose_node_of(nodes, processes[2])
    assert run.process.wait(PATIENCE_SECONDS) == 1
    text = " ".join(run.text().split())
    assert f"waiting up to {TIMEOUT_SECONDS} s for 4 CPUs: the cluster has 2 CPUs" in text
    last = run.text().strip().splitlines()[-1]
    assert last.startswith("ilrec: error: a node was lost and none took its place within")

    # What is left is enough for half the workers, and the run goes on with them.
    newest = sorted((run.trainings / "sft-seed0/checkpoints").glob("step-*"))[-1]
    step = json.loads((newest / "manifest.json").read_text())["step"]
    run = Run(path, config.run_dir, nodes.address, "launch.workers=2")
    run.wait_for_attempt(4)
    lines = read_metrics(run.trainings / "sft-seed0")
    resumed = [line["step"] for line in lines if "resumed/dropped_steps" in line]
    assert resumed[-1] == step
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(PATIENCE_SECONDS) == 143
