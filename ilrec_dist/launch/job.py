"""One function call for the whole worker group, and what a worker process does with it.

Under torchrun: `torchrun --nproc-per-node 2 -m ilrec_dist.launch.job JOB.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilrec_dist.common.disk import not_writable
from ilrec_dist.common.errors import NotWritable, Stopped, UserError
from ilrec_dist.common.files import read_json_object, write_json, write_text
from ilrec_dist.common.loading import load_function
from ilrec_dist.launch.attempts import begin_attempt
from ilrec_dist.launch.failures import describe, identity, is_of_another_rank

GOES_ON = "and the same command goes on from the last checkpoint"
# In a job's folder: the failure that a worker leaves for the driver.
FAILURE = ".failure.json"

FOR_WORKERS = {
    # Megatron-core hands functions to torch.compile when it is imported, and that loads the
    # compiler, a fifth of a worker's start, although none of these functions is used here.
    "TORCHDYNAMO_DISABLE": "1",
    # glibc before 2.38 hands the few bytes that it cuts off to align a tensor to small blocks, so
    # that the tensor's place fits no tensor of the same size again. Without the lists of freed
    # small blocks the bytes join their neighbours, and a step needs a third less memory for what
    # lies between its passes. It takes no longer.
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}
# For workers that are all on one machine: where gloo and NCCL listen.
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


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
    # Absolute paths of the other files and folders that workers read.
    reads: Sequence[str] = ()

    @property
    def failure_file(self) -> Path:
        return Path(self.folder) / FAILURE

    @property
    def other_failure_file(self) -> Path:
        """In its place where nothing can be written
        to the job's folder; on this machine only.
        """
        name = hashlib.sha256(self.folder.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"ilrec-failure-{os.getuid()}-{name}.json"

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

    A failure that another attempt would meet again is left in
    `failure_file` for the driver: a UserError, a full or read-only
    disk, and a failure that is the same as in the attempt before.
    """
    # The group was restarted because the other ranks lost the one that met the error.
    if _left_failure(job) is not None:
        return
    try:
        begin_attempt(Path(job.folder), job.failures_folder)
        function = load_function(job.function)
        # No model is there yet, and what is imported stays: it need not be looked through.
        gc.freeze()
        function(**job.arguments)
    except Stopped:
        # All is saved, and the driver, which asked for it, ends.
        return
    except UserError as error:
        _leave_failure(job, str(error), by_user=True)
    except Exception as error:
        refused = not_writable(error, job.folder)
        if refused is not None:
            _leave_failure(job, f"{refused}, {GOES_ON}", by_user=False)
        elif _is_repeated(job, error):
            line = f"{describe(error)}; a second attempt failed in the same way, so no other is "
            line += f"made (the traceback is in {job.traceback_file})"
            _leave_failure(job, line, by_user=False)
        raise


def is_refused(folder: Path) -> bool:
    """Whether a worker has left a failure for the driver in its job's folder."""
    return (folder / FAILURE).exists()


def _leave_failure(job: Job, line: str, by_user: bool) -> None:
    """Write the line for the driver, to the
    machine's temporary folder if it must be.
    """
    for path in (job.failure_file, job.other_failure_file):
        try:
            write_json(path, {"error": line, "by_user": by_user})
            return
        except (OSError, NotWritable):
            continue


def take_failure(job: Job) -> dict[str, Any] | None:
    """What a worker left for the driver; None
    where it left nothing. Leaves nothing behind.
    """
    path = _left_failure(job)
    if path is None:
        return None
    failure = read_json_object(path)
    with contextlib.suppress(OSError):
        path.unlink()
    return failure


def _left_failure(job: Job) -> Path | None:
    """The file in which a worker left a failure. Another user's is none of ours."""
    for path in (job.failure_file, job.other_failure_file):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                return path
    return None


def _is_repeated(job: Job, error: Exception) -> bool:
    """Whether this rank met the same failure in
    an earlier attempt; notes it for the next.

    Never where it only says that another rank is gone.
    """
    folder = job.failures_folder
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"rank-{os.environ.get('RANK', '0')}.json"
    described, of_another_rank = describe(error), is_of_another_rank(error)
    same = identity(error)
    repeated = note.exists() and read_json_object(note)["identity"] == same
    contents = {"error": described, "identity": same, "of_another_rank": of_another_rank}
    write_json(note, contents)
    if not of_another_rank:
        write_text(job.traceback_file, "".join(traceback.format_exception(error)))
    return repeated and not of_another_rank


def main() -> None:
    run_job(Job.from_json(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
