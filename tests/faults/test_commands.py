"""What a failing test has started does not outlive it."""

from __future__ import annotations

import subprocess

import psutil
import pytest

from tests.support.commands import ended_commands

# A process in a session of its own loses its parent; one without the environment does, and hangs.
SCRIPT = """
(setsid sleep 600 & echo $!)
(env -i sleep 600 & sleep 0.5; kill -STOP $!; echo $!)
sleep 600
"""


def test_all_processes_of_a_command_end_and_the_failure_is_told() -> None:
    with pytest.raises(ValueError, match="the test's own"), ended_commands() as commands:
        command = commands.start(["bash", "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
        processes = [psutil.Process(int(command.stdout.readline())) for _ in range(2)]
        processes.append(psutil.Process(command.pid))
        assert all(process.is_running() for process in processes)
        raise ValueError("the test's own")
    assert not [one for one in processes if one.is_running() and one.status() != "zombie"]
