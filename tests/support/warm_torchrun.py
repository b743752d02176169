"""Worker groups that are there already, in torchrun's place.

A worker that torchrun starts takes eight seconds of a core until it does anything.
Where a test is not about starting workers, its jobs run in the processes of
`run_distributed`: as many, joined over gloo, and forked once a session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from ilrec_dist.common.errors import WorkersFailed
from ilrec_dist.launch import workers
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.job import Job, run_job
from ilrec_dist.testing.distributed import Mesh, run_distributed

Engine = Callable[[LaunchConfig, Job], None]
JOB_SECONDS = 600.0
run_torchrun = workers.ENGINES["torchrun"]


def run_warm(launch: LaunchConfig, job: Job) -> None:
    """Run a job as torchrun would, without another attempt after a failure."""
    try:
        run_distributed(_work, launch.workers, 1, job.to_json(), timeout=JOB_SECONDS)
    except RuntimeError as error:
        raise WorkersFailed(str(error)) from error


def _work(_mesh: Mesh, job: str) -> None:
    try:
        run_job(Job.from_json(job))
    finally:
        torch.set_num_threads(1)


@contextmanager
def torchrun_is(run: Engine) -> Iterator[None]:
    """Within it, `run` takes the place of torchrun's engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(workers.ENGINES, "torchrun", run)
        yield
