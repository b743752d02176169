"""Workers of Ray that are forked from a process which has imported
torch, Megatron-core and this project already.

A worker that Ray starts takes four seconds of a core until it does anything, most of
them for imports. Where a test is not about starting workers, they come from here: Ray
starts a process as ever, which hands all that it was started with to this one
(warm_python/), and ends when the worker does. Ray's raylet is not the worker's parent,
and what /proc says of its environment is not its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import runpy
import shlex
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection as pipes
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from ilrec_dist.testing.distributed import PRELOADED

HOOK = Path(__file__).parent / "warm_python"
# As warm_python/sitecustomize.py has it.
SERVER = "ILREC_WARM_WORKERS"
# Of the message that says what a process was started with.
MOST_BYTES = 1 << 18
CLONE_FS, CLONE_NEWNS, CLONE_NEWNET = 0x200, 0x20000, 0x40000000


@contextmanager
def worker_server() -> Iterator[str]:
    """The path of a socket at which workers can be had.

    Those that are there at the end stay.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ready, is_ready = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="ilrec-") as folder:
        path = f"{folder}/workers"
        process = context.Process(target=_serve, args=(path, is_ready))
        process.start()
        is_ready.close()
        try:
            ready.recv()
            yield path
        finally:
            process.kill()
            process.join()


@contextmanager
def warm_workers(path: str) -> Iterator[None]:
    """Within it, Ray nodes that this process starts have workers from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SERVER, path)
        patch.setenv("PYTHONPATH", str(HOOK), prepend=os.pathsep)
        yield


def _serve(path: str, is_ready: pipes.Connection) -> None:
    """Fork a worker for each process that asks, until the parent ends."""
    # What else a worker of Ray imports. Ray itself reads its environment when it is imported.
    import google.protobuf  # noqa: F401
    import jsonschema  # noqa: F401
    import pandas  # noqa: F401
    import pydantic  # noqa: F401
    import requests  # noqa: F401

    gc.freeze()
    # Nobody waits for the workers.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    is_ready.send(True)
    parent: Any = parent_process()
    while parent.sentinel not in pipes.wait([listener, parent.sentinel]):
        asking, _ = listener.accept()
        text, files, _, _ = socket.recv_fds(asking, MOST_BYTES, 4)
        if os.fork() == 0:
            # The other end of `asking` sees it closed when the worker ends.
            listener.close()
            _become(json.loads(text), files)
        asking.close()
        for file in files:
            os.close(file)


def _become(started: dict[str, Any], files: Sequence[int]) -> NoReturn:
    """Be the process that was started with these words; its files are
    the outputs, and the namespaces of network and mounts.
    """
    code: Any = 1
    try:
        output, errors, network, mounts = files
        os.dup2(output, 1)
        os.dup2(errors, 2)
        _enter(network, mounts)
        for file in files:
            os.close(file)
        os.setpgid(0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(started["folder"])
        os.environ.clear()
        os.environ.update(started["environment"])
        sys.path[:] = started["path"]
        random.seed()
        np.random.seed()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        # Where a worker has an environment of its own, a script sets it, and has a shell execute
        # Python with the worker's script.
        os.execvp = lambda file, args: _run(shlex.split(args[-1])[2:])
        _run(started["words"])
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else int(code is not None))


def _enter(network: int, mounts: int) -> None:
    """Enter the namespaces of these files, where they are others."""
    if os.path.samestat(os.fstat(network), os.stat("/proc/self/ns/net")):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.setns(network, CLONE_NEWNET)
        or libc.unshare(CLONE_FS)
        or libc.setns(mounts, CLONE_NEWNS)
    ):
        raise OSError(ctypes.get_errno(), "no entering of the node's namespaces")


def _run(words: Sequence[str]) -> None:
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
