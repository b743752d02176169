"""One function call for the whole worker group, and what a worker process does with it.

Under torchrun: `torchrun --nproc-per-node 2 -m ilrec_dist.launch.job JOB.json`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import write_json


@dataclass(frozen=True)
class Job:
    """A function that every worker calls with the same arguments; the launcher does not know what it does."""

    # "package.module:function".
    function: str
    # The function's keyword arguments; JSON values, so that torchrun's workers can read them.
    arguments: dict[str, Any]
    # An absolute path that all workers see; a worker leaves the user's own errors there.
    folder: str

    @property
    def failure_file(self) -> Path:
        return Path(self.folder) / ".failure.json"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))


def run_job(job: Job) -> None:
    """Call the job's function in this worker.

    A UserError is left in `failure_file` for the driver, for a retry would meet it again.
    """
    # The group was restarted because the other ranks lost the one that met the error.
    if job.failure_file.exists():
        return
    try:
        load_function(job.function)(**job.arguments)
    except UserError as error:
        write_json(job.failure_file, {"error": str(error)})


def load_function(name: str) -> Callable[..., None]:
    """The function that "package.module:function" names."""
    module, _, function = name.partition(":")
    loaded: Callable[..., None] = getattr(importlib.import_module(module), function)
    return loaded


def main() -> None:
    run_job(Job.from_json(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
