"""Starts a worker group for one job, by Ray Train or by torchrun, and waits for it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.common.files import write_json
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.launch.job import Job, job_to_json, run_job

HEARD_SECONDS = 10.0
NO_HEAD = "no Ray head answers there"
START_ONE = (
    "start one with `ray start --head` and give the address that it prints, or none for a local Ray"
)


def run_workers(config: Config, job: Job) -> None:
    """Run `job` in launch.workers processes. Raises UserError for the user's own errors, WorkersFailed when the retries are used up."""
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    job.failure_file.unlink(missing_ok=True)
    try:
        if config.launch.engine == "ray":
            _run_ray(config, job)
        else:
            _run_torchrun(config, job)
    finally:  # the other ranks fail when the one that met the error leaves
        if job.failure_file.exists():
            message = json.loads(job.failure_file.read_text())["error"]
            job.failure_file.unlink()
            raise UserError(message)


@contextlib.contextmanager
def cluster(config: Config) -> Iterator[None]:
    """One Ray session for all stages of a run: the given cluster, or a local one that ends with this process. Nothing for torchrun."""
    if config.launch.engine != "ray":
        yield
        return
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray

    address = config.launch.ray_address or os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = (
        {}
        if address
        else {
            "num_cpus": max(len(os.sched_getaffinity(0)), config.launch.workers),
            "include_dashboard": False,
        }
    )
    where = (
        f"launch.ray_address {address}" if config.launch.ray_address else f"RAY_ADDRESS={address}"
    )
    if address:
        _refuse_unless_heard(address, where)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except ConnectionError as error:
        raise UserError(
            f"{where}: {NO_HEAD} ({' '.join(str(error).split())}); {START_ONE}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_unless_heard(address: str, where: str) -> None:
    """Ray itself tries for minutes before it gives up a host and port where nothing listens."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{where}: that is a dashboard's address; expected the head's, HOST:PORT as `ray start --head` prints it, or auto"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), HEARD_SECONDS).close()
        except (OSError, OverflowError, ValueError) as error:
            raise UserError(f"{where}: {NO_HEAD} ({error}); {START_ONE}") from None


@contextlib.contextmanager
def reward_actor(config: Config, wanted: bool) -> Iterator[None]:
    """The run's reward actors while a training needs one; their counters are left in the run's folder when it ends."""
    if not wanted or config.cf.rewards != "actor":
        yield
        return
    from ilrec_dist.cf.rewards.service import RewardClient, reward_actors

    folders, name, replicas, shards = (
        RunFolders(config.run_dir),
        reward_actor_name(config),
        config.cf.reward_replicas,
        config.cf.reward_shards,
    )
    backwards = config.data.both_directions
    with reward_actors(
        folders.cf,
        folders.data,
        folders.items,
        name=name,
        replicas=replicas,
        shards=shards,
        max_restarts=-1,
        backwards=backwards,
    ):
        yield
        write_json(
            folders.cf / "actor-counters.json", RewardClient(name, replicas, shards).counters()
        )


def reward_actor_name(config: Config) -> str:
    """One name per run folder, so that runs may share a cluster."""
    return f"rewards-{config.name}-{zlib.crc32(str(config.run_dir.resolve()).encode()):08x}"


def _run_ray(config: Config, job: Job) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpu = _on_gpus(config)
    trainer = TorchTrainer(
        lambda: run_job(job),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.launch.workers,
            use_gpu=gpu,
            resources_per_worker={"GPU": 1} if gpu else {"CPU": 1},
        ),
        run_config=RunConfig(
            name="workers",
            storage_path=str((Path(job.folder) / ".ray").resolve()),
            failure_config=FailureConfig(max_failures=config.launch.max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise WorkersFailed(
            f"the workers failed more than launch.max_failures = {config.launch.max_failures} times; the last failure: {error}"
        ) from error


def _on_gpus(config: Config) -> bool:
    """Whether the workers get a GPU each: the cluster may have them where this process has none."""
    import ray

    if config.launch.device != "auto":
        return config.launch.device == "cuda"
    return ray.cluster_resources().get("GPU", 0) >= config.launch.workers


def _run_torchrun(config: Config, job: Job) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="ilrec-job-") as file:
        file.write(job_to_json(job))
        file.flush()
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={config.launch.workers}",
        ]
        command += [
            f"--max-restarts={config.launch.max_failures}",
            "-m",
            "ilrec_dist.launch.job",
            file.name,
        ]
        threads = config.launch.threads or max(
            1, len(os.sched_getaffinity(0)) // config.launch.workers
        )
        done = subprocess.run(
            command,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            preexec_fn=_ended_with_parent(),
        )
    if done.returncode:
        raise WorkersFailed(
            f"torchrun ended with exit status {done.returncode}; its output above says why"
        )


def _ended_with_parent() -> Callable[[], None] | None:
    """What a new process calls so that the kernel ends it when this one dies, even of SIGKILL: torchrun then ends its workers. Linux only."""
    if sys.platform != "linux":
        return None
    libc, pr_set_pdeathsig = ctypes.CDLL(None), 1
    return lambda: libc.prctl(pr_set_pdeathsig, signal.SIGTERM)
