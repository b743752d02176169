"""Starts a worker group for one job, by Ray Train or by torchrun, and waits for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.common.stop_request import StopRequest
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.device import default_threads
from ilrec_dist.launch.job import FOR_WORKERS, ON_LOOPBACK, Job, take_failure

# How long torchrun may take to end its workers.
TERMINATE_SECONDS = 40.0


def run_workers(launch: LaunchConfig, job: Job) -> None:
    """Run `job` in launch.workers processes.

    Raises UserError for the user's own errors; WorkersFailed when the
    retries are used up, and for a failure that a retry would meet again.
    """
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    take_failure(job)
    StopRequest(Path(job.folder)).clear()
    shutil.rmtree(job.failures_folder, ignore_errors=True)
    try:
        ENGINES[launch.engine](launch, job)
    finally:
        # The other ranks fail when the one that met the error leaves, so this comes first.
        failure = take_failure(job)
        if failure is not None:
            if failure["by_user"]:
                shutil.rmtree(job.failures_folder, ignore_errors=True)
            raise (UserError if failure["by_user"] else WorkersFailed)(failure["error"])
    shutil.rmtree(job.failures_folder, ignore_errors=True)


def _run_ray(launch: LaunchConfig, job: Job) -> None:
    # Ray takes a second to load, and torchrun does not need it.
    from ilrec_dist.launch.ray_workers import run_ray

    run_ray(launch, job)


def _run_torchrun(launch: LaunchConfig, job: Job) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="ilrec-job-") as file:
        file.write(job.to_json())
        file.flush()
        command = [sys.executable, "-m", "ilrec_dist.launch.one_machine"]
        command += [f"--nproc-per-node={launch.workers}", f"--max-restarts={launch.max_failures}"]
        command += ["-m", "ilrec_dist.launch.job", file.name]
        threads = launch.threads or default_threads(launch.workers)
        environment = {"OMP_NUM_THREADS": str(threads), **FOR_WORKERS, **ON_LOOPBACK, **os.environ}
        if launch.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        process = subprocess.Popen(
            command,
            env=environment,
            preexec_fn=end_with_parent(),
        )
        try:
            status = process.wait()
        except BaseException:
            try:
                StopRequest(Path(job.folder)).ask_if_terminated()
            finally:
                # torchrun ends its workers when it is terminated; killed, it would leave them.
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TERMINATE_SECONDS)
                process.kill()
            raise
    if status:
        raise WorkersFailed(f"torchrun ended with exit status {status}; its output above says why")


# Run a job in all workers of launch.engine, and return when all have ended.
ENGINES: dict[str, Callable[[LaunchConfig, Job], None]] = {
    "ray": _run_ray,
    "torchrun": _run_torchrun,
}


def end_with_parent() -> Callable[[], None] | None:
    """What a new process calls so that the kernel
    ends it when this one dies, even of SIGKILL.

    torchrun then ends its workers. Linux only.
    """
    if sys.platform != "linux":
        return None
    libc, pr_set_pdeathsig = ctypes.CDLL(None), 1
    return lambda: libc.prctl(pr_set_pdeathsig, signal.SIGTERM)
