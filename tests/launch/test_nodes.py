"""Two Ray nodes, of which one is lost: a job
waits for another, and goes on or says why not.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.nodes import Nodes

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
PATIENCE_SECONDS = 300
ENVIRONMENT = {
    # As the launchers have it.
    "RAY_health_check_timeout_ms": "2000",
    # A node is given up after five bad checks.
    "RAY_health_check_period_ms": "1000",
}
LIGHT_JOB = """
import sys
from ilrec_dist.common.errors import WorkersFailed
from ilrec_dist.launch.cluster import ray_session
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.job import Job
from ilrec_dist.launch.workers import run_workers
address, folder, seconds = sys.argv[1:]
launch = LaunchConfig(
    workers=3, device="cpu", timeout_seconds=float(seconds), ray_address=address
)
try:
    with ray_session(launch):
        run_workers(launch, Job("tests.launch.failing:run_on", {"folder": folder}, folder))
except WorkersFailed as error:
    sys.exit(f"ilrec: error: {error}")
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head with two CPUs, and a node of as many."""
    nodes = Nodes(tmp_path_factory.mktemp("nodes"), 2, **ENVIRONMENT)
    try:
        nodes.join(2)
        nodes.wait_for_head()
        yield nodes
    finally:
        nodes.close()


class Command:
    """A command on the head's node."""

    def __init__(self, nodes: Nodes, log: Path, *words: str) -> None:
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                nodes.on_head([sys.executable, *words]),
                env=nodes.environment,
                stdout=file,
                stderr=file,
            )

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.text()}"
            assert time.monotonic() < until, f"no {what}:\n{self.text()}"
            time.sleep(0.05)


class LightJob(Command):
    """Three workers that do nothing, of which two have room on the head's node."""

    def __init__(self, nodes: Nodes, folder: Path, timeout_seconds: int) -> None:
        self.folder = folder
        words = (nodes.address, str(folder), str(timeout_seconds))
        super().__init__(nodes, folder / "log", "-c", LIGHT_JOB, *words)

    def wait_for_attempt(self, number: int) -> None:
        paths = [self.folder / f"worker-{rank}" for rank in range(3)]
        self.wait_for(
            f"attempt {number}",
            lambda: all(path.exists() and path.stat().st_size >= number for path in paths),
        )


def test_a_run_waits_for_a_node_and_goes_on_when_it_joins(nodes: Nodes, tmp_path: Path) -> None:
    run = LightJob(nodes, tmp_path, PATIENCE_SECONDS)
    run.wait_for_attempt(1)
    nodes.lose(nodes.nodes[-1])
    run.wait_for("word of it", lambda: "for 3 CPUs: the cluster has 2 CPUs on 1 node" in run.text())
    nodes.join(1)
    run.wait_for_attempt(2)
    assert "the cluster has 3 CPUs again" in run.text()
    run.process.terminate()
    run.process.wait(PATIENCE_SECONDS)


def test_a_lost_node_that_nothing_replaces_ends_the_run_with_one_line(
    nodes: Nodes, tmp_path: Path
) -> None:
    run = LightJob(nodes, tmp_path, 3)
    run.wait_for_attempt(1)
    lost = time.monotonic()
    nodes.lose(nodes.nodes[-1], silent=True)
    run.wait_for("word of it", lambda: "a node of the cluster is lost" in run.text())
    assert time.monotonic() - lost < 30
    assert run.process.wait(PATIENCE_SECONDS) == 1
    last = run.text().strip().splitlines()[-1]
    assert last.startswith("ilrec: error: a node was lost and none took its place within ")
    assert "= 3: the workers need 3 CPUs, the cluster has 2 CPUs on 1 node" in last
