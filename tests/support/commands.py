"""Commands that a test starts, and that end with it whether it passes or fails."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

# What the processes of a command inherit beside their session, also those that have lost their
# parent. Some leave the session, and others, such as Ray's workers, write their title over it.
MARK = "ILREC_TEST_COMMAND"
PATIENCE_SECONDS = 30


class Commands:
    """Starts commands, and ends all of their processes."""

    def __init__(self) -> None:
        self.mark, self.started = secrets.token_hex(8), list[subprocess.Popen[Any]]()

    def start(self, command: Sequence[str | Path], **settings: Any) -> subprocess.Popen[Any]:
        """As subprocess.Popen, in a session of its own."""
        environment = {**(settings.pop("env", None) or os.environ), MARK: self.mark}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **settings)
        self.started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        """Those of the commands that still run."""
        found, sessions = [], {command.pid for command in self.started}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if os.getsid(process.pid) in sessions or process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def end(self) -> None:
        """Kill what still runs, hanging processes too. Raises
        AssertionError where something of it stays.
        """
        until = time.monotonic() + PATIENCE_SECONDS
        while left := self.processes():
            assert time.monotonic() < until, left
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
        for command in self.started:
            command.wait(PATIENCE_SECONDS)
            for pipe in (command.stdin, command.stdout, command.stderr):
                if pipe is not None:
                    # What a killed command has not read is lost.
                    with contextlib.suppress(OSError):
                        pipe.close()


@contextlib.contextmanager
def ended_commands() -> Iterator[Commands]:
    """What is started in the block ends with it; an error in the block goes on."""
    commands = Commands()
    try:
        yield commands
    finally:
        commands.end()
