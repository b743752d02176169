"""The Ray session of a command: a given cluster, or a local one that ends with the process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.launch.config import LaunchConfig

CONNECT_SECONDS = 10.0
NO_HEAD = "no Ray head answers there"
START_ONE = (
    "start one with `ray start --head` and give the address that it prints, or none for a local Ray"
)


def cluster_address(launch: LaunchConfig) -> str | None:
    """The address of the Ray cluster that the user named; None where a local one is started."""
    return launch.ray_address or os.environ.get("RAY_ADDRESS")


@contextlib.contextmanager
def ray_session(launch: LaunchConfig) -> Iterator[dict[str, float]]:
    """Connect to the named cluster, or start a local Ray, for the length of the block.

    Yields what the cluster has, such as {"CPU": 64, "GPU": 8}. Nothing happens under torchrun,
    and no new connection is made where this process has one.
    """
    if launch.engine != "ray":
        yield {}
        return
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Ray takes a second to load, which commands without workers need not wait for.
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()  # type: ignore[no-untyped-call]
        return
    address = cluster_address(launch)
    source = f"launch.ray_address {address}" if launch.ray_address else f"RAY_ADDRESS={address}"
    options: dict[str, Any] = {}
    if address:
        _check_head(address, source)
    else:
        cores = max(len(os.sched_getaffinity(0)), launch.workers)
        options = {"num_cpus": cores, "include_dashboard": False}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options
        )
    except ConnectionError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: {NO_HEAD} ({reason}); {START_ONE}") from None
    # Ray's own handler exits in the middle of its C++ code.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield ray.cluster_resources()  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()


def _check_head(address: str, source: str) -> None:
    """Raise UserError where nothing listens; Ray itself would try for minutes."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{source}: that is a dashboard's address; expected the head's, HOST:PORT as "
            "`ray start --head` prints it, or auto"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError, ValueError) as error:
            raise UserError(f"{source}: {NO_HEAD} ({error}); {START_ONE}") from None
