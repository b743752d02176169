"""A training over two Ray nodes, data parallel over
them and tensor parallel on each, and what befalls it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.launch.attempts import Attempt, read_attempts, read_workers
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.testing.distributed import run_distributed
from ilrec_dist.training import checkpoint
from tests.support.commands import Commands
from tests.support.nodes import QUICK, Node, Nodes
from tests.support.soaked_training import OF_A_RUN
from tests.support.tiny_run import tiny_config, train_here

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
    pytest.mark.usefixtures("warm_ray"),
]
PATIENCE_SECONDS = 240
# A lost node is given up after these, in which workers that start side by side must meet, on a busy
# machine too.
TIMEOUT_SECONDS = 15


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """A head with two CPUs, and a node of as many."""
    nodes = Nodes(tmp_path, 2, **QUICK)
    try:
        nodes.join(2)
        yield nodes
    finally:
        nodes.close()


class Training:
    """`ilrec train` on the head's node, and what its folder says."""

    def __init__(self, commands: Commands, nodes: Nodes, config: Path, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        self.log = config.with_name(f"{folder.parents[1].name}.log")
        command = [sys.executable, "-m", "ilrec_dist.cli", "train", str(config)]
        with open(self.log, "w") as file:
            self.process = commands.start(
                nodes.on_head(command), env=nodes.environment, stdout=file, stderr=file
            )

    def text(self) -> str:
        return self.log.read_text()

    def last_line(self) -> str:
        return self.text().strip().splitlines()[-1]

    def wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.text()}"
            assert time.monotonic() < until, f"no {what}:\n{self.text()}"
            time.sleep(0.05)

    @property
    def checkpoints(self) -> list[Path]:
        return checkpoint.committed(self.folder / "checkpoints")

    @property
    def attempts(self) -> list[Attempt]:
        return read_attempts(self.folder.parent)

    def wait_for_attempt(self, before: int) -> list[int]:
        """The process ids of the workers by rank, once an attempt
        after `before` of them has committed a checkpoint.
        """
        self.wait_for("attempt", lambda: len(self.attempts) > before)
        old = self.checkpoints[-1:]
        self.wait_for("checkpoint", lambda: self.checkpoints[-1:] != old)
        processes = [worker["process"] for worker in read_workers(self.folder.parent, 4)]
        places = [self.node_of(process).number for process in processes]
        # The ranks of a tensor-parallel group are on one node, and the groups on two.
        assert places[0] == places[1] != places[2] == places[3]
        return processes

    def node_of(self, process: int) -> Node:
        nodes = self.nodes
        (node,) = (node for node in nodes.nodes if process in nodes.processes(node))
        return node

    def other_node(self, processes: list[int]) -> Node:
        """The node of two of these workers that is not the head's."""
        places = (self.node_of(process) for process in processes)
        return next(node for node in places if node.number > 0)


def manifest(path: Path) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((path / checkpoint.MANIFEST).read_text())
    return contents


def test_lost_nodes_change_no_bit(nodes: Nodes, commands: Commands, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "runs",
        # It is ended before its last step.
        train={"methods": ["sft"], "epochs": 1000, "checkpoint_steps": 5, "validate_epochs": 1000},
        backbone={"num_layers": 1},
        launch={
            "engine": "ray",
            "workers": 4,
            "tp": 2,
            "max_failures": 20,
            "timeout_seconds": TIMEOUT_SECONDS,
            "ray_address": nodes.address,
        },
    )
    for stage in ("prepare", "index"):
        execute(config, stage)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    nodes.wait_for_head()
    run = Training(commands, nodes, path, config.run_dir / "train/sft-seed0")
    # A spare node, which joins when the workers have their places.
    run.wait_for("workers", lambda: len(run.attempts) > 0)
    spare = nodes.join(2)
    processes = run.wait_for_attempt(0)
    run.wait_for("spare node", lambda: nodes.has_joined(spare))

    # A node is lost; the spare one takes its place.
    nodes.lose(run.other_node(processes))
    processes = run.wait_for_attempt(1)
    assert all(attempt.is_restart for attempt in run.attempts[1:])

    # The power of a node is cut, and there is no other.
    lost = time.monotonic()
    nodes.lose(run.other_node(processes), silent=True)
    newest = manifest(run.checkpoints[-1])
    # Meanwhile the same training on one node and without a fault, up to the same step.
    whole = tmp_path / "whole"
    arguments = (config_to_dict(config), "sft", str(whole), newest["step"])
    with ThreadPoolExecutor(1) as beside:
        undisturbed = beside.submit(run_distributed, train_here, 4, 2, *arguments)
        run.wait_for("word of it", lambda: "a node of the cluster is lost" in run.text())
        assert time.monotonic() - lost < 30
        assert run.process.wait(PATIENCE_SECONDS) == 1
        undisturbed.result()
    line = "ilrec: error: a node was lost and none took its place within launch.timeout_seconds = "
    line += f"{TIMEOUT_SECONDS}: the workers need 4 CPUs, the cluster has 2 CPUs on 1 node"
    assert run.last_line().startswith(line)
    # What is left of Ray on the head's node is the cluster's own.
    assert not [title for title in nodes.titles().values() if OF_A_RUN.search(title)]

    # Parameters and moments.
    expected = manifest(checkpoint.committed(whole / "checkpoints")[-1])
    assert expected["step"] == newest["step"] and len(newest["sha256"]) == 4
    assert expected["sha256"] == newest["sha256"]
