"""Run a plain function in several gloo processes and collect what each returns.

`run_distributed(fn, world_size, tp, *args)`
"""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["ilrec_dist.testing.preloaded"]


@dataclass(frozen=True)
class Mesh:
    """Where a process stands.

    Tensor-parallel ranks are neighbours, as in Megatron: rank = dp_rank · tp + tp_rank.
    """

    rank: int
    world_size: int
    tp: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup

    @property
    def dp(self) -> int:
        return self.world_size // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp


class _Pool:
    """`world_size` processes joined over gloo, which run one function after another."""

    def __init__(self, world_size: int) -> None:
        # Forked from a process that has imported what takes seconds to import.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.TemporaryDirectory(prefix="ilrec-test-")
        # A free port for code that reads MASTER_PORT; the pool itself meets through a file.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            parent_end, child_end = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(child_end, rank, world_size, self.folder.name, port),
                daemon=True,
            )
            process.start()
            child_end.close()
            self.connections.append(parent_end)
            self.processes.append(process)

    def call(
        self, fn: Callable[..., Any], tp: int, args: tuple[Any, ...], timeout: float
    ) -> list[Any]:
        message = pickle.dumps((list(sys.path), pickle.dumps((fn, args)), tp))
        for connection in self.connections:
            connection.send_bytes(message)
        deadline = time.monotonic() + timeout
        pending = dict(enumerate(self.connections))
        answers: dict[int, Any] = {}
        while pending:
            for rank, connection in list(pending.items()):
                if connection.poll(0.005):
                    try:
                        ok, value = pickle.loads(connection.recv_bytes())
                    except EOFError:
                        raise RuntimeError(f"rank {rank} died in {fn.__name__}") from None
                    if not ok:
                        raise RuntimeError(f"rank {rank} failed in {fn.__name__}:\n{value}")
                    answers[rank] = value
                    del pending[rank]
            if pending and time.monotonic() > deadline:
                raise TimeoutError(
                    f"{fn.__name__}: ranks {sorted(pending)} did not answer within {timeout:.0f} s"
                )
        return [answers[rank] for rank in range(len(self.connections))]

    def close(self) -> None:
        for connection in self.connections:
            # The process leaves its loop when the pipe closes.
            connection.close()
        for process in self.processes:
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()


_pools: dict[int, _Pool] = {}


def run_distributed(
    fn: Callable[..., Any], world_size: int, tp: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call `fn(mesh, *args)` in `world_size` processes; returns the results by rank.

    `fn` is a top-level function of an importable module; arguments and results are
    pickled. torch.distributed is initialised and each process has one thread. The
    processes are started at the first call for a world size and stay for the session;
    the groups are ended after every call. A failure on any rank raises RuntimeError
    with that rank's traceback, and fresh processes are started at the next call;
    `timeout` is in seconds.
    """
    if world_size % tp:
        raise ValueError(f"tp={tp} does not divide world_size={world_size}")
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
    try:
        return _pools[world_size].call(fn, tp, args, timeout)
    except BaseException:
        _pools.pop(world_size).close()
        raise


def close_pools() -> None:
    """End the processes of every world size."""
    while _pools:
        _pools.popitem()[1].close()


atexit.register(close_pools)


def _serve(connection: Connection, rank: int, world_size: int, folder: str, port: int) -> None:
    """A pool's process: answer calls until the parent closes the pipe."""
    torch.set_num_threads(1)
    # What is imported stays, and need not be looked through after every call.
    gc.freeze()
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    for number in itertools.count():
        try:
            path, call, tp = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            break
        try:
            sys.path[:] = path
            fn, args = pickle.loads(call)
            # Every call has groups of its own. Each gloo group polls in a thread, and Megatron
            # makes dozens of groups that nothing else would end.
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous-{number}",
                rank=rank,
                world_size=world_size,
            )
            answer = (True, fn(_make_mesh(rank, world_size, tp), *args))
            if dist.is_initialized():
                # Another rank may still be connecting a group that this one has.
                dist.barrier()
            _end_groups()
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
    # Interpreter shutdown with a live gloo group can hang.
    os._exit(0)


def _end_groups() -> None:
    """End the groups of a call, Megatron's too where the function left them."""
    megatron = sys.modules.get("megatron.core.parallel_state")
    if megatron is not None:
        megatron.destroy_model_parallel()
    dist.destroy_process_group()
    # Engines hold groups in reference cycles.
    gc.collect()


def _make_mesh(rank: int, world_size: int, tp: int) -> Mesh:
    tp_group = dp_group = None
    for first in range(0, world_size, tp):
        ranks = list(range(first, first + tp))
        group = dist.new_group(ranks, backend="gloo")
        tp_group = group if rank in ranks else tp_group
    for first in range(tp):
        ranks = list(range(first, world_size, tp))
        group = dist.new_group(ranks, backend="gloo")
        dp_group = group if rank in ranks else dp_group
    assert tp_group is not None and dp_group is not None
    return Mesh(rank, world_size, tp, tp_group, dp_group)
