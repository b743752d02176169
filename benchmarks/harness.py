"""What the benchmarks share: the command line, the machine's description, worker
processes, memory.

Nothing but the standard library and torch is
imported, so that `gpu.py` runs without installation.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "numpy",
    "pyarrow",
    "faiss-cpu",
    "triton",
    "transformers",
    "peft",
    "deepspeed",
    "ray",
)
SAMPLE_SECONDS = 0.005


class NumberedIds(Sequence[str]):
    """The ids "0", "1", … of drawn users or items, which take no memory."""

    def __init__(self, count: int) -> None:
        self.numbers = range(count)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [str(number) for number in self.numbers[index]]
        return str(self.numbers[index])


def command_line(
    description: str | None, quick: str | None, example: str | None = None
) -> argparse.ArgumentParser:
    """A parser with `--json FILE` and, unless `quick`, its help, is None, `--quick`."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=example and f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures here as well")
    return parser


def describe_machine(**more: Any) -> dict[str, Any]:
    """CPU model, cores, versions and commit of this measurement, and whatever `more`
    adds.
    """
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        # A machine that only measures may have no git.
        commit = ""
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "commit": commit or None,
        **versions,
        **more,
    }


def machine_line(machine: dict[str, Any]) -> str:
    """One line of `describe_machine` for the top of a table."""
    rest = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "cpu")
    return f"{machine['cpu']}; {rest}"


def write_figures(path: Path | None, figures: Any) -> None:
    """Write the figures as JSON where `--json` asks for it."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def in_own_process(
    script: str, *arguments: str, threads: int | None = None, **environment: str
) -> dict[str, Any]:
    """Run `script` with hidden arguments; its last line of output is the JSON that is
    returned.

    What a process holds and has held is its own then, and so is its peak of memory.
    """
    variables = {**os.environ, **environment}
    if threads is not None:
        variables["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        [sys.executable, script, *arguments], env=variables, stdout=subprocess.PIPE, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def set_rank(rank: int, world_size: int, port: int) -> None:
    """What torch.distributed's env:// reads, for processes that
    `worker_group` started.
    """
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


@contextmanager
def worker_group(
    worker: Callable[..., None], world_size: int, arguments: Sequence[Any]
) -> Iterator[Callable[[], Any]]:
    """Start `worker(rank, *arguments, port, queue)` in `world_size` processes.

    Gives a function that returns the next object put into the queue, and
    raises what a worker raised. The processes are waited for at the end.
    """
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(  # type: ignore[no-untyped-call]
        worker, (*arguments, free_port(), queue), nprocs=world_size, join=False
    )

    def receive() -> Any:
        while queue.empty():
            if context.join(timeout=0.2) and queue.empty():
                raise RuntimeError("the workers ended without a result")
        return queue.get()

    yield receive
    while not context.join():
        pass


def status_mib(key: str, process: int | str = "self") -> float:
    """A line of /proc/PROCESS/status that is in kB, such as VmRSS, in MiB."""
    status = Path(f"/proc/{process}/status")
    for line in status.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{status} has no {key}; this benchmark needs Linux")


def peak_mib() -> float:
    """The most memory that this process has held, mapped files included."""
    # The ru_maxrss of getrusage begins with that of the process which started this one.
    return status_mib("VmHWM")


def reset_peak() -> None:
    """Let `peak_mib` begin again with what this process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def anonymous_mib() -> float:
    """The memory that this process holds, without mapped files."""
    return status_mib("RssAnon")


def largest_child_mib() -> float:
    """The same of the child that holds most, of those that the main thread started.

    Until a child runs its own program it shows this process's memory, and does not
    count.
    """
    held = [0.0]
    own = Path("/proc/self/cmdline").read_bytes()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in children:
        # It may have just ended.
        with suppress(OSError, RuntimeError):
            mib = status_mib("RssAnon", child)
            if Path(f"/proc/{child}/cmdline").read_bytes() != own:
                held.append(mib)
    return max(held)


class PeakMemory:
    """The most anonymous memory that this process held within the block, or what else
    `read` says in MiB, sampled every 5 ms.
    """

    def __init__(self, read: Callable[[], float] = anonymous_mib) -> None:
        self.mib = 0.0
        self._read = read
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.is_set():
            self.mib = max(self.mib, self._read())
            self._end.wait(SAMPLE_SECONDS)
