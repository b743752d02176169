"""One function call for the whole worker group, and what a worker process does with it.

Under torchrun: `torchrun --nproc-per-node 2 -m ilrec_dist.launch.job JOB.json`.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object, write_json, write_text

# What the system says of a disk on which nothing can be written.
UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
# Parts of the messages by which gloo, NCCL and TCP say that the other side is gone.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "gloo",
    "NCCL",
)


@dataclass(frozen=True)
class Job:
    """A function that every worker calls with the same arguments.

    The launcher does not know what it does.
    """

    # "package.module:function".
    function: str
    # The function's keyword arguments; JSON values, so that torchrun's workers can read them.
    arguments: dict[str, Any]
    # An absolute path that all workers see; a worker leaves the user's own errors there.
    folder: str

    @property
    def failure_file(self) -> Path:
        return Path(self.folder) / ".failure.json"

    @property
    def failures_folder(self) -> Path:
        """Where each rank notes the failure of its last attempt."""
        return Path(self.folder) / ".failures"

    @property
    def traceback_file(self) -> Path:
        return self.failures_folder / "traceback.txt"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))


def run_job(job: Job) -> None:
    """Call the job's function in this worker.

    A failure that another attempt would meet again is left in `failure_file` for the driver: a
    UserError, a full or read-only disk, and a failure that is the same as in the attempt before.
    """
    # The group was restarted because the other ranks lost the one that met the error.
    if job.failure_file.exists():
        return
    try:
        load_function(job.function)(**job.arguments)
    except UserError as error:
        write_json(job.failure_file, {"error": str(error), "by_user": True})
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            line = f"{error.filename or job.folder}: {error.strerror}; make room, and the same "
            line += "command goes on from the last checkpoint"
            write_json(job.failure_file, {"error": line, "by_user": False})
        elif not _is_of_another_rank(error) and _is_repeated(job, error):
            line = f"{_describe(error)}; a second attempt failed in the same way, so no other is "
            line += f"made (the traceback is in {job.traceback_file})"
            write_json(job.failure_file, {"error": line, "by_user": False})
        raise


def _is_of_another_rank(error: Exception) -> bool:
    """Whether the failure only says that another process of the group, or an actor, is gone."""
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    is_distributed = any("Dist" in cls.__name__ for cls in type(error).__mro__)
    is_lost = any(words in str(error) for words in LOST_PEER)
    return "ray" in modules or is_distributed or is_lost or isinstance(error, ConnectionError)


def _is_repeated(job: Job, error: Exception) -> bool:
    """Whether this rank met the same failure in an earlier attempt; notes it for the next."""
    folder = job.failures_folder
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"rank-{os.environ.get('RANK', '0')}.json"
    described = _describe(error)
    repeated = note.exists() and read_json_object(note)["error"] == described
    write_json(note, {"error": described})
    write_text(job.traceback_file, "".join(traceback.format_exception(error)))
    return repeated


def _describe(error: Exception) -> str:
    """One line: the kind of failure, its message without addresses, and where it arose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = re.sub(r"0x[0-9a-f]+", "0x…", " ".join(str(error).split()))
    return f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})"


def load_function(name: str) -> Callable[..., None]:
    """The function that "package.module:function" names."""
    module, _, function = name.partition(":")
    loaded: Callable[..., None] = getattr(importlib.import_module(module), function)
    return loaded


def main() -> None:
    run_job(Job.from_json(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
