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
from typing import Any

from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.common.files import read_json_object
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.device import default_threads
from ilrec_dist.launch.job import Job, run_job

# How long torchrun may take to end its workers.
TERMINATE_SECONDS = 40.0


def run_workers(launch: LaunchConfig, job: Job) -> None:
    """Run `job` in launch.workers processes.

    Raises UserError for the user's own errors; WorkersFailed when the retries are used up, and
    for a failure that a retry would meet again.
    """
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    job.failure_file.unlink(missing_ok=True)
    shutil.rmtree(job.failures_folder, ignore_errors=True)
    try:
        if launch.engine == "ray":
            _run_ray(launch, job)
        else:
            _run_torchrun(launch, job)
    finally:
        # The other ranks fail when the one that met the error leaves, so this comes first.
        if job.failure_file.exists():
            failure = read_json_object(job.failure_file)
            job.failure_file.unlink()
            raise (UserError if failure["by_user"] else WorkersFailed)(failure["error"])
    shutil.rmtree(job.failures_folder, ignore_errors=True)


def _run_ray(launch: LaunchConfig, job: Job) -> None:
    # Ray takes a second to load, and torchrun does not need it.
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    class InterruptibleTrainer(TorchTrainer):
        """Leaves Ctrl-C to this process; Ray's own handler ends it with status 1 and no word."""

        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

    gpu = _on_gpus(launch)
    trainer = InterruptibleTrainer(
        lambda: run_job(job),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=launch.workers,
            use_gpu=gpu,
            resources_per_worker={"GPU": 1} if gpu else {"CPU": 1},
        ),
        run_config=RunConfig(
            name="workers",
            storage_path=str((Path(job.folder) / ".ray").resolve()),
            failure_config=FailureConfig(max_failures=launch.max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise WorkersFailed(
            f"the workers failed more than launch.max_failures = {launch.max_failures} times; "
            f"the last failure: {lines[-1].strip() if lines else error}"
        ) from error
    except KeyboardInterrupt:
        if trainer.controller is not None:
            # The workers end with their controller.
            ray.kill(trainer.controller)
        raise


def _on_gpus(launch: LaunchConfig) -> bool:
    """Whether each worker gets a GPU; the cluster may have them where this process has none."""
    if launch.device != "auto":
        return launch.device == "cuda"
    # As in `_run_ray`.
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get("GPU", 0) >= launch.workers


def _run_torchrun(launch: LaunchConfig, job: Job) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="ilrec-job-") as file:
        file.write(job.to_json())
        file.flush()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={launch.workers}", f"--max-restarts={launch.max_failures}"]
        command += ["-m", "ilrec_dist.launch.job", file.name]
        threads = launch.threads or default_threads(launch.workers)
        process = subprocess.Popen(
            command,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            preexec_fn=_end_with_parent(),
        )
        try:
            status = process.wait()
        except BaseException:
            # torchrun ends its workers when it is terminated; killed, it would leave them.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TERMINATE_SECONDS)
            process.kill()
            raise
    if status:
        raise WorkersFailed(f"torchrun ended with exit status {status}; its output above says why")


def _end_with_parent() -> Callable[[], None] | None:
    """What a new process calls so that the kernel ends it when this one dies, even of SIGKILL.

    torchrun then ends its workers. Linux only.
    """
    if sys.platform != "linux":
        return None
    libc, pr_set_pdeathsig = ctypes.CDLL(None), 1
    return lambda: libc.prctl(pr_set_pdeathsig, signal.SIGTERM)
