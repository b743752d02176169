"""Ray sessions: tokens, addresses that are no
Ray's, and what a local session leaves behind.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ended_commands

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 90
RIGHT, WRONG = "a" * 64, "b" * 64
SESSION = """
import sys, time
from ilrec_dist.common.errors import UserError
from ilrec_dist.launch.cluster import ray_session
from ilrec_dist.launch.config import LaunchConfig
began = time.monotonic()
try:
    with ray_session(LaunchConfig(ray_address=sys.argv[1] or None)):
        print("connected")
except UserError as error:
    print(error)
print(time.monotonic() - began)
"""
HEAD = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def environment(home: Path, token: str | None) -> dict[str, str]:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    tokens = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return {**cleared, "HOME": str(home), **tokens}


def connect(home: Path, address: str, token: str | None) -> tuple[str, float]:
    """What a session says, and the seconds that it took."""
    done = subprocess.run(
        [sys.executable, "-c", SESSION, address],
        env=environment(home, token),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    *said, seconds = done.stdout.strip().splitlines()
    return "\n".join(said), float(seconds)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a head that asks for the token RIGHT."""
    home = tmp_path_factory.mktemp("home")
    with ended_commands() as commands:
        process = commands.start(
            [sys.executable, "-c", HEAD],
            env=environment(home, RIGHT),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(PATIENCE_SECONDS)


def test_the_right_token_connects(head, tmp_path):
    assert connect(tmp_path, head, RIGHT)[0] == "connected"


@pytest.mark.parametrize("token", [None, WRONG])
def test_a_missing_or_wrong_token_is_named_within_a_minute(head, tmp_path, token):
    said, seconds = connect(tmp_path, head, token)
    assert said.startswith(f"launch.ray_address {head}: ") and "\n" not in said
    assert "token" in said and "RAY_AUTH_TOKEN_PATH" in said
    assert seconds < 60


def test_a_port_that_another_program_has_is_named_within_a_minute(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        # It takes a connection and closes it without a word.
        threading.Thread(target=lambda: listener.accept(), daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        said, seconds = connect(tmp_path, address, None)
    expected = f"launch.ray_address {address}: no Ray head answers there, but another program;"
    assert said.startswith(expected) and seconds < 60
