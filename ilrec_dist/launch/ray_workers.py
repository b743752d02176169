"""Runs a job in the workers of Ray Train.

Only imported where Ray is used, and behind
`ray_session`, which sets what Ray reads on import.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2.api.exceptions import TrainingFailedError

from ilrec_dist.common.errors import WorkersFailed
from ilrec_dist.common.stop_request import StopRequest
from ilrec_dist.launch.cluster import cluster_address
from ilrec_dist.launch.cluster_check import check_cluster, demand_of
from ilrec_dist.launch.cluster_watch import ClusterWatch, watched_cluster
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.job import FOR_WORKERS, ON_LOOPBACK, Job, run_job
from ilrec_dist.launch.loopback import LOOPBACK, loopback_store

# After this long without an answer Ray Train takes a worker for dead: a stopped process too.
HEALTH_CHECK_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
# What Ray Train would start processes for: to deal out Ray's own data sets, of which there are none
# here, and to give back what a lost controller held. Ray's head does that itself, but only when the
# driver's connection ends, as it does with the command (`ray_session`).
WITHOUT_USE = ("DatasetsCallback", "PlacementGroupCleanerCallback")


# For workers whose store is there already; torch's own is started by the first of them.
WITH_STORE = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
# The store that this process has opened for its group.
_stores: list[Any] = []


class LoopbackConfig(TorchConfig):
    """How torch.distributed is set up for workers of
    one machine: nothing listens where others reach it.
    """

    @property
    def backend_cls(self) -> type[Any]:
        return LoopbackBackend


class LoopbackBackend(_TorchBackend):
    """Ray Train's own, with a store of ours in the first worker."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        group: Any = _WithStore(worker_group)
        super().on_start(group, backend_config)


class _WithStore:
    """A worker group that is asked for a free port, and opens the store there."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def __len__(self) -> int:
        return len(self._group)

    def execute_single(self, index: int, function: Any, *arguments: Any) -> Any:
        is_asked = function.__name__ == "get_address_and_port"
        return self._group.execute_single(index, _open_store if is_asked else function, *arguments)


def _open_store() -> tuple[str, int]:
    _stores.append(loopback_store())
    return LOOPBACK, _stores[-1].port


class RayWorkers(TorchTrainer):
    """Leaves Ctrl-C to this process; Ray's own
    handler ends it with status 1 and no word.

    It starts no helpers that nobody needs: seconds of each
    start, and a process that would stay on a standing cluster.
    """

    controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in callbacks if type(callback).__name__ not in WITHOUT_USE]

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def end(self) -> None:
        """End the workers, which end with their controller."""
        if self.controller is not None:
            ray.kill(self.controller)


def run_ray(launch: LaunchConfig, job: Job) -> None:
    """Run `job` in launch.workers processes of
    the cluster that this process is connected to.

    Raises UserError where the cluster cannot run it, and WorkersFailed when
    the retries are used up, a lost node is not replaced, other jobs have what the
    workers need for too long, or Ray itself fails.
    """
    if cluster_address(launch) is not None:
        check_cluster(launch, Path(job.folder), job.reads)
    demand = demand_of(launch)
    gpu = demand.resource == "GPU"
    os.environ.setdefault(HEALTH_CHECK_TIMEOUT, str(launch.timeout_seconds))
    is_here = cluster_address(launch) is None
    config = LoopbackConfig if is_here else TorchConfig
    trainer = RayWorkers(
        lambda: run_job(job),
        torch_config=config(
            backend="nccl" if gpu else "gloo", timeout_s=int(launch.timeout_seconds)
        ),
        scaling_config=ScalingConfig(
            num_workers=launch.workers,
            use_gpu=gpu,
            resources_per_worker={"GPU": 1} if gpu else {"CPU": 1},
        ),
        # Its declared type is that of Ray Train's first version, without the last argument.
        run_config=RunConfig(  # type: ignore[call-arg]
            name="workers",
            storage_path=str((Path(job.folder) / ".ray").resolve()),
            failure_config=FailureConfig(max_failures=launch.max_failures),
            worker_runtime_env={"env_vars": worker_environment(is_here, gpu)},
        ),
    )
    watch = ClusterWatch(demand, launch.timeout_seconds, trainer.end)
    with watched_cluster(watch):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise WorkersFailed(
                f"the workers failed more than launch.max_failures = {launch.max_failures} times; "
                f"the last failure: {lines[-1].strip() if lines else error}"
            ) from error
        except (RayActorError, OutOfMemoryError) as error:
            if watch.failure is None:
                reason, *_ = (line for line in str(error).splitlines() if line.strip())
                raise WorkersFailed(
                    f"Ray lost the process that leads the workers: {reason.strip()} The same "
                    "command goes on where it stopped"
                ) from error
        except KeyboardInterrupt:
            try:
                StopRequest(Path(job.folder)).ask_if_terminated()
            finally:
                trainer.end()
            raise
    if watch.failure is not None:
        raise WorkersFailed(watch.failure)


def worker_environment(is_here: bool, gpu: bool) -> dict[str, str]:
    """Variables for the workers, whatever those of the nodes are; as this process has
    them, where it does. is_here: all workers are on this machine. gpu: each has one.
    """
    variables = FOR_WORKERS | (ON_LOOPBACK | WITH_STORE if is_here else {})
    variables = {name: os.environ.get(name, value) for name, value in variables.items()}
    # Ray lets workers that ask for no GPU see all of their node.
    return variables | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
