"""The Ray session of a command: a given cluster,
or a local one that ends with the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.launch.config import LaunchConfig

CONNECT_SECONDS = 10.0
# How often Ray asks a head that does not answer: once takes 40 s, and the default a quarter hour.
ATTEMPTS = {"RAY_gcs_server_port_wait_time_s": "1"}
# For a local session. Nobody announces that its node will be taken away, for which Ray Train would
# start a process that listens. The second has its node on the loopback address, as Ray does by
# itself where it has no clusters.
LOCAL = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# How a client of HTTP/2 begins, with an empty frame of settings, and the head of such a frame.
HTTP2_FRAME_BYTES, HTTP2_SETTINGS = 9, 4
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, HTTP2_SETTINGS, 0, 0, 0, 0, 0]
)
TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
NO_HEAD = "no Ray head answers there"
START_ONE = (
    "start one with `ray start --head` and give the address that it prints, or none for a local Ray"
)
GIVE_TOKEN = (
    "the cluster asks for a Ray token, and this process has none or another; set "
    "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with the token of the cluster's nodes"
)


def cluster_address(launch: LaunchConfig) -> str | None:
    """The address of the Ray cluster that the
    user named; None where a local one is started.
    """
    return launch.ray_address or os.environ.get("RAY_ADDRESS")


def is_on_named_cluster(launch: LaunchConfig) -> bool:
    """Whether the workers are those of a Ray cluster that the user named."""
    return launch.engine == "ray" and cluster_address(launch) is not None


@contextlib.contextmanager
def ray_session(launch: LaunchConfig) -> Iterator[dict[str, float]]:
    """Connect to the named cluster, or start a local Ray, for the length of the block.

    Yields what the cluster has, such as {"CPU": 64, "GPU": 8}. Nothing happens
    under torchrun, and no new connection is made where this process has one.
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
        _set_token()
    on_terminate = signal.getsignal(signal.SIGTERM)
    # Ray's processes read it from their environment; this one had when Ray was loaded.
    constants = ray._private.ray_constants
    has_clusters = constants.ENABLE_RAY_CLUSTER
    with _environment(ATTEMPTS if address else LOCAL):
        if not address:
            constants.ENABLE_RAY_CLUSTER = False
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
        except ray.exceptions.AuthenticationError:
            raise UserError(f"{source}: {GIVE_TOKEN}") from None
        except (ConnectionError, RuntimeError) as error:
            if not address:
                raise
            raise UserError(f"{source}: {_reason(error)}") from None
        finally:
            constants.ENABLE_RAY_CLUSTER = has_clusters
        # Ray's own handler exits in the middle of its C++ code.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)
        try:
            yield ray.cluster_resources()  # type: ignore[no-untyped-call]
        finally:
            ray.shutdown()


def _reason(error: BaseException) -> str:
    """Why there is no connection: in what Ray was
    handling stands whether a token was refused.
    """
    seen: BaseException | None = error
    while seen is not None:
        if "Unauthenticated" in str(seen) or "AuthenticationError" in str(seen):
            return GIVE_TOKEN
        seen = seen.__cause__ or seen.__context__
    return f"{NO_HEAD} ({' '.join(str(error).split())}); {START_ONE}"


def _set_token() -> None:
    """Give this process's local Ray a token that is gone with the process.

    Ray would write one to the home, for which every later `ray start` there
    would ask. What the user says about tokens stays. Ray reads
    RAY_AUTH_MODE when it is loaded, and sets it itself for a local session.
    """
    if not any(name in os.environ for name in TOKEN_VARIABLES):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that are not set yet, for the length of the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


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
            with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as link:
                speaks = os.environ.get("RAY_USE_TLS", "0") != "0" or _speaks_http2(link)
        except (OSError, OverflowError, ValueError) as error:
            raise UserError(f"{source}: {NO_HEAD} ({error}); {START_ONE}") from None
        if not speaks:
            raise UserError(f"{source}: {NO_HEAD}, but another program; {START_ONE}")


def _speaks_http2(link: socket.socket) -> bool:
    """Whether a gRPC server listens, such as Ray's
    head: it answers this with its own settings.
    """
    answer = b""
    try:
        link.sendall(HTTP2_PREFACE)
        while len(answer) < HTTP2_FRAME_BYTES:
            received = link.recv(HTTP2_FRAME_BYTES - len(answer))
            if not received:
                return False
            answer += received
    except ConnectionError:
        # The other side has closed the connection with what was sent unread.
        return False
    return answer[3] == HTTP2_SETTINGS
