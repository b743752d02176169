"""Ray nodes of one machine: each in a network
namespace of its own, where root allows that.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.warm_ray import HOOK, SERVER

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
PATIENCE_SECONDS = 120
# So that loss is noticed soon, and little is started that a test does without.
QUICK = {
    # As the launchers have it.
    "RAY_health_check_timeout_ms": "2000",
    # A node is given up after five bad checks, which follow each other quickly here.
    "RAY_health_check_period_ms": "100",
    # How often Ray Train asks the workers, and how long it waits for one that hangs at its end.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
    "RAY_worker_niceness": "0",
    # Of the memory that counts for Ray most may be other programs'.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


# A head of ray.cluster_utils without helpers that no test looks at.
BARE_HEAD = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}


@dataclass
class Node:
    number: int
    address: str
    process: subprocess.Popen[bytes]


class Nodes:
    """A head, and nodes that join it and are lost. The head's node is number 0."""

    def __init__(self, folder: Path, cpus: int, **environment: str) -> None:
        self.folder, self.name = folder, f"ilrec-{os.getpid()}-{secrets.token_hex(2)}"
        # Ray sees the heads of other runs, in their namespaces too, and starts none at the address
        # of another.
        self.network = f"10.{64 + secrets.randbelow(64)}.{secrets.randbelow(256)}"
        self.has_namespaces = self._make_namespace(0)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        folders = [str(ROOT), str(ROOT / "kernels")]
        if self.has_namespaces and SERVER in os.environ:
            # Its processes are found by their namespace; elsewhere they are those of its tree.
            folders.insert(0, str(HOOK))
        path = {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        # gloo would take the address of the machine's name, which is outside of the namespaces.
        interface = {"GLOO_SOCKET_IFNAME": "eth0"} if self.has_namespaces else {}
        cleared = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = cleared | token | path | interface | environment
        address = self.address_of(0)
        self.address = f"{address}:{6379 if self.has_namespaces else _free_port()}"
        self.nodes: list[Node] = []
        self._joined = 0
        head = ["--head", f"--port={self.address.rpartition(':')[2]}"]
        self._start(0, cpus, [*head, "--include-dashboard=false", "--no-monitor"])

    def join(self, cpus: int) -> Node:
        """Start another node; it is one of the cluster some seconds later."""
        # Never the number, and so the address, of a node that was lost.
        self._joined += 1
        number = self._joined
        if self.has_namespaces:
            self._make_namespace(number)
        return self._start(number, cpus, [f"--address={self.address}"])

    def _start(self, number: int, cpus: int, words: list[str]) -> Node:
        address = self.address_of(number)
        options = [f"--num-cpus={cpus}", f"--object-store-memory={100 << 20}", "--block"]
        options += [f"--node-ip-address={address}", "--disable-usage-stats"]
        options += ["--include-log-monitor=false"]
        with open(self.folder / f"node-{number}.log", "w") as log:
            process = subprocess.Popen(
                self._inside(number, [*RAY, "start", *words, *options]),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.nodes.append(Node(number, address, process))
        return self.nodes[-1]

    def address_of(self, number: int) -> str:
        return f"{self.network}.{1 + number}" if self.has_namespaces else "127.0.0.1"

    def wait_for_head(self) -> None:
        """Wait until the head listens, for at most PATIENCE_SECONDS."""
        host, _, port = self.address.rpartition(":")
        ask = f"import socket; socket.create_connection(({host!r}, {port}), 1)"
        command = self.on_head([sys.executable, "-S", "-c", ask])
        until = time.monotonic() + PATIENCE_SECONDS
        while subprocess.run(command, capture_output=True).returncode:
            log = self.folder / "node-0.log"
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)

    def on_head(self, command: list[str]) -> list[str]:
        """The command that runs this one on the head's node."""
        return self._inside(0, command)

    def lose(self, node: Node, silent: bool = False) -> None:
        """Kill all that runs on it. Silent: as
        where its power is cut, and nobody is told.
        """
        if self.has_namespaces and silent:
            _ip("-n", self._namespace(0), "link", "set", f"node{node.number}", "down")
        for process in self.processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        node.process.wait()
        self.nodes.remove(node)
        if self.has_namespaces and node.number > 0:
            # The head's holds the bridge that the others are on.
            _ip("netns", "delete", self._namespace(node.number))

    def processes(self, node: Node) -> list[int]:
        """All that runs on it; in a namespace
        also what has lost its parent.
        """
        if self.has_namespaces:
            return _inside_of(self._namespace(node.number))
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(node.process.pid)
            return [parent.pid, *(child.pid for child in parent.children(True))]
        return []

    def titles(self) -> dict[int, bytes]:
        """The command lines of all that runs on the nodes."""
        return {
            process: title
            for node in self.nodes
            for process in self.processes(node)
            if (title := title_of(process))
        }

    def close(self) -> None:
        for node in list(reversed(self.nodes)):
            self.lose(node)
        if self.has_namespaces:
            clear_namespaces(self.name)

    def has_joined(self, node: Node) -> bool:
        """Whether the cluster counts on it."""
        return "Ray runtime started" in (self.folder / f"node-{node.number}.log").read_text()

    def _namespace(self, number: int) -> str:
        return f"{self.name}-{number}"

    def _inside(self, number: int, command: list[str]) -> list[str]:
        if not self.has_namespaces:
            return command
        return ["ip", "netns", "exec", self._namespace(number), *command]

    def _make_namespace(self, number: int) -> bool:
        """A namespace on the bridge of the head's, which is
        made with number 0. False where this user may not.
        """
        name, head = self._namespace(number), self._namespace(0)
        if not _ip("netns", "add", name):
            return False
        if number == 0:
            made = _ip("-n", head, "link", "add", "eth0", "type", "bridge")
        else:
            made = _ip(
                *("link", "add", "eth0", "netns", name, "type", "veth"),
                *("peer", "name", f"node{number}", "netns", head),
            )
            _ip("-n", head, "link", "set", f"node{number}", "master", "eth0", "up")
        if not made:
            _ip("netns", "delete", name)
            return False
        _ip("-n", name, "addr", "add", f"{self.network}.{1 + number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")
        return True


def title_of(process: int) -> bytes:
    """What /proc has as its command line; nothing where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


def clear_namespaces(name: str) -> None:
    """End what still runs on the nodes of that name, and
    remove their namespaces; the program may have been killed.
    """
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.split()
    for namespace in names:
        if not namespace.startswith(f"{name}-"):
            continue
        for process in _inside_of(namespace):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        _ip("netns", "delete", namespace)


def _inside_of(namespace: str) -> list[int]:
    command = ["ip", "netns", "pids", namespace]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return [int(process) for process in found]


def _ip(*words: str) -> bool:
    try:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
