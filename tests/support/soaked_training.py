"""One training on three Ray nodes, as an operator sees
it: its command, its folder and its processes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ilrec_dist.launch.attempts import read_workers
from ilrec_dist.reporting.metrics_log import RESUMED
from ilrec_dist.reporting.progress import LogFollower
from ilrec_dist.training import checkpoint
from tests.support.nodes import QUICK, Node, Nodes, clear_namespaces, title_of

WORKERS = 2
# The launch.timeout_seconds for which the times here are meant; they grow with it.
TIMEOUT_SECONDS = 20
# How long what a command or a group has left behind may take to end.
ENDING_SECONDS = 60.0
# How long nodes may take to join.
JOINING_SECONDS = 240.0
# How often a head is started.
HEADS = 3
POLL_SECONDS = 0.05
# The processes of a run: of Ray's those that do something for a job, and the command's own. Some
# are the node's or the cluster's own, for the jobs to come.
OF_THE_CLUSTER = rb"IDLE|DashboardAgent|RuntimeEnvAgent|_AutoscalingCoordinatorActor"
OF_A_RUN = re.compile(rb"ray::(?!" + OF_THE_CLUSTER + rb")|ilrec_dist\.cli")
WORKER, ACTOR = b"ray::RayTrainWorker", b"ray::RewardActor"


class Broken(AssertionError):
    """A promise that was not kept."""


class SoakedTraining:
    """`ilrec train` on the head's node, which can hold one of the two workers.

    There is always a node more than the workers need.
    """

    def __init__(self, state: Path, config: Path, folder: Path, timeout: float) -> None:
        """timeout: launch.timeout_seconds; more of them on a machine that is slow."""
        self.state, self.config, self.folder = state, config, folder
        self.slowness = timeout / TIMEOUT_SECONDS
        self.log = state / "command.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._is_open = False
        # The last logged step, and where the training last went on from: step, steps dropped, and
        # Unix seconds.
        self.step, self.resumed = 0, (0, 0, 0.0)
        self._logged_at, self._follower = 0.0, LogFollower(folder)
        # Of the last fault: which rank or node it was, and what was printed before it.
        self.what, self._printed = "", 0

    def begin(self) -> None:
        """Open the cluster, and give the command."""
        # What a killed soak has left.
        name = self.state / "cluster"
        if name.exists():
            clear_namespaces(name.read_text())
        for attempt in range(HEADS):
            self.nodes = Nodes(self.state, 1, **QUICK)
            self._is_open = True
            name.write_text(self.nodes.name)
            try:
                self.nodes.wait_for_head()
                break
            except AssertionError:
                # On a busy machine Ray gives up its head as well.
                self.nodes.close()
                if attempt == HEADS - 1:
                    raise
        for _ in range(2):
            self.nodes.join(1)
        self.wait_for_nodes()
        self.start()

    def wait_for_nodes(self) -> None:
        """Until every node has joined, the spare one too. Ray
        gives up a node that is slow to start; another takes its place.
        """
        until = time.monotonic() + JOINING_SECONDS * self.slowness
        while waiting := [node for node in self.nodes.nodes if not self.nodes.has_joined(node)]:
            if time.monotonic() > until:
                raise RuntimeError(f"a node does not join; see the logs in {self.state}")
            for node in waiting:
                if node.process.poll() is not None:
                    self.nodes.lose(node)
                    self.nodes.join(1)
            time.sleep(0.2)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        if self._is_open:
            self.nodes.close()
            self._is_open = False

    def begin_anew(self) -> None:
        """Everything again but the run's folder, after a broken promise."""
        self.close()
        self.begin()

    # The command

    def start(self) -> None:
        command = [sys.executable, "-m", "ilrec_dist.cli", "train", str(self.config), "--resume"]
        command.append(f"launch.ray_address={self.nodes.address}")
        with open(self.log, "a") as file:
            self.process = subprocess.Popen(
                self.nodes.on_head(command),
                env=self.nodes.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def end(self, code: int, until: float, number: int | None = None) -> str:
        """Send the signal, if one is given, and wait till the
        command has ended with this code; its last line.
        """
        assert self.process is not None
        if number is not None:
            self.process.send_signal(number)
        try:
            found = self.process.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Broken("the command did not end") from None
        if found != code:
            raise Broken(f"exit code {found} instead of {code}: {self.last_line()}")
        return self.last_line()

    def mark(self) -> None:
        """What is printed from now on is looked at."""
        self._printed = self.log.stat().st_size if self.log.exists() else 0

    def printed(self) -> str:
        """What the command has printed since the last fault."""
        with open(self.log, "rb") as file:
            file.seek(self._printed)
            return file.read().decode(errors="replace")

    def last_line(self) -> str:
        lines = self.printed().strip().splitlines()
        return lines[-1] if lines else ""

    def require_no_traceback(self) -> None:
        """The last thing printed is no traceback: neither
        a frame of one nor the error at its end.
        """
        last = self.last_line()
        if re.match(r'\s+File "|Traceback |\S*(Error|Exception)\b(: |$)', last):
            raise Broken(f"the last line is a traceback's: {last}")

    # The folder

    @property
    def is_finished(self) -> bool:
        return self.process is not None and self.process.poll() == 0

    @property
    def checkpoints(self) -> list[Path]:
        return checkpoint.committed(self.folder / "checkpoints")

    @property
    def newest(self) -> int:
        """The step of the newest committed checkpoint; 0 where there is none."""
        return max((int(path.name.rpartition("-")[2]) for path in self.checkpoints), default=0)

    def look(self) -> None:
        """Read what the training has logged since the last look."""
        for line in self._follower.read():
            if RESUMED in line:
                self.resumed = (line["step"], int(line[RESUMED]), line["time"])
            elif "loss/total" in line:
                self._logged_at = line["time"]
            self.step = line["step"]

    def wait_for(self, what: str, ready: Callable[[], bool], until: float) -> None:
        """Until the training has ended too. Raises Broken after
        `until`, and where the command ended otherwise.
        """
        while True:
            self.look()
            if ready():
                return
            assert self.process is not None
            code = self.process.poll()
            if code == 0:
                return
            if code is not None:
                raise Broken(f"exit code {code} before {what}: {self.last_line()}")
            if time.monotonic() > until:
                raise Broken(f"no {what}")
            time.sleep(POLL_SECONDS)

    def wait_for_progress(self, beyond: int, seconds: float) -> None:
        """Until a checkpoint behind step `beyond` is committed."""
        until = time.monotonic() + seconds * self.slowness
        self.wait_for(f"checkpoint behind step {beyond}", lambda: self.newest > beyond, until)

    def wait_for_resumption(self, since: float, until: float) -> None:
        """Until the training has gone on from a checkpoint
        after that time, and logged a step.
        """
        self.wait_for(
            "step after the fault", lambda: since < self.resumed[2] < self._logged_at, until
        )

    def wait_for_step(self, since: float, until: float) -> None:
        """Until a step that was logged after that time."""
        self.wait_for("step after the fault", lambda: self._logged_at > since, until)

    # The processes

    def worker(self, rank: int) -> int:
        """The process of the rank."""
        worker: int = read_workers(self.folder.parent, WORKERS)[rank]["process"]
        if not title_of(worker).startswith(WORKER):
            raise Broken(f"the process that the folder names for rank {rank} is no worker")
        return worker

    def node_of(self, process: int) -> Node:
        for node in self.nodes.nodes:
            if process in self.nodes.processes(node):
                return node
        raise Broken(f"process {process} is on no node")

    def of_run(self, title: bytes = b"") -> list[int]:
        """The run's processes on all nodes, those whose title begins so."""
        return [
            process
            for process, found in self.nodes.titles().items()
            if OF_A_RUN.search(found) and found.startswith(title)
        ]

    def actor(self) -> int | None:
        """The process of the reward actor, while there is just one."""
        found = self.of_run(ACTOR)
        return found[0] if len(found) == 1 else None

    def raylet_of(self, node: Node) -> int:
        (raylet,) = (
            process
            for process in self.nodes.processes(node)
            if os.path.basename(title_of(process).partition(b"\0")[0]) == b"raylet"
        )
        return raylet

    def require_all_ended(self) -> None:
        """After the command's end no process of the run is left."""
        self._require_none("processes of the ended run", self.of_run)

    def require_none_too_many(self) -> None:
        """While it trains there are its workers and
        one actor, and none of an earlier group.
        """

        def surplus() -> list[int]:
            workers, actors = self.of_run(WORKER), self.of_run(ACTOR)
            return workers[WORKERS:] + actors[1:]

        if not self.is_finished:
            self._require_none("workers or actors of an earlier group", surplus)

    def _require_none(self, what: str, left: Callable[[], list[int]]) -> None:
        until = time.monotonic() + ENDING_SECONDS * self.slowness
        while found := left():
            if time.monotonic() > until:
                titles = {title_of(process).split(b"\0")[0].decode() for process in found}
                raise Broken(f"{what} are left: {', '.join(sorted(titles))}")
            time.sleep(0.2)
