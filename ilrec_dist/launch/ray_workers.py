"""Runs a job in the workers of Ray Train.

Only imported where Ray is used, and behind `ray_session`, which sets what Ray reads on import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from ilrec_dist.common.errors import WorkersFailed
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.job import Job, run_job


class InterruptibleTrainer(TorchTrainer):
    """Leaves Ctrl-C to this process; Ray's own handler ends it with status 1 and no word."""

    controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller


def run_ray(launch: LaunchConfig, job: Job) -> None:
    """Run `job` in launch.workers processes of the cluster that this process is connected to.

    Raises WorkersFailed when the retries are used up.
    """
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
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get("GPU", 0) >= launch.workers
