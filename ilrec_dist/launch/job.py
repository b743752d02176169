"""What a worker process does once it is started; under torchrun: `torchrun --nproc-per-node 2 -m ilrec_dist.launch.job JOB.json`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import write_json
from ilrec_dist.common.run_layout import RESULT, RunFolders
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.config.tree import Config
from ilrec_dist.pipeline.stage_runs import cf_part
from ilrec_dist.training.spec import TrainingSpec


@dataclass(frozen=True)
class Job:
    """One thing for the whole worker group to do; plain values, so that it travels as JSON."""

    config: dict[str, Any]
    folder: str  # where the job leaves the user's own errors
    trainings: list[dict[str, Any]]  # one after the other
    evaluate: bool  # all that is trained, after that
    cf: bool = False  # only the CF models, with a table split over the workers

    @classmethod
    def of(cls, config: Config, trainings: Sequence[TrainingSpec], evaluate: bool) -> Job:
        plain = [
            dataclasses.asdict(training) | {"folder": str(training.folder.resolve())}
            for training in trainings
        ]
        return cls(
            _for_workers(config),
            str(RunFolders(config.run_dir).trainings.resolve()),
            plain,
            evaluate,
        )

    @classmethod
    def of_cf(cls, config: Config) -> Job:
        return cls(
            _for_workers(config),
            str(RunFolders(config.run_dir).cf_work.resolve()),
            [],
            evaluate=False,
            cf=True,
        )

    @property
    def failure_file(self) -> Path:
        return Path(self.folder) / ".failure.json"


def _for_workers(config: Config) -> dict[str, Any]:
    return config_to_dict(
        dataclasses.replace(config, runs_dir=str(Path(config.runs_dir).resolve()))
    )  # they have another working directory


def run_job(job: Job) -> None:
    """Run in every worker process. The user's own errors are left in `failure_file` for the driver; retrying them would not help."""
    if job.failure_file.exists():
        return  # a group restarted because the other ranks missed the one that met the error
    try:
        _run(job)
    except UserError as error:
        write_json(job.failure_file, {"error": str(error)})


def _run(job: Job) -> None:
    quiet()
    import torch

    from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
    from ilrec_dist.pipeline.artifacts import RunArtifacts

    config = config_from_dict(job.config)
    device = resolve_device(config)
    workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", config.launch.workers))
    if device == "cpu":
        torch.set_num_threads(
            config.launch.threads or max(1, len(os.sched_getaffinity(0)) // workers_here)
        )
    parallel = initialize_parallel(config.launch.tp, device)
    artifacts = RunArtifacts(config)
    try:
        if job.cf:
            cf_part(config, artifacts, device)
        for plain in job.trainings:
            from ilrec_dist.training.trainer import train

            folder = Path(plain["folder"])
            if not (folder / RESULT).exists():  # a restarted group passes over what is done
                train(
                    config,
                    plain["method"],
                    plain["seed"],
                    folder,
                    plain["fingerprint"],
                    artifacts,
                    parallel,
                )
        if job.evaluate:
            from ilrec_dist.pipeline.stages.evaluate import evaluate_trained

            evaluate_trained(config, artifacts, parallel)
    finally:
        destroy_parallel()


def resolve_device(config: Config) -> Literal["cpu", "cuda"]:
    """`auto`: the GPUs, where every worker of this machine has one. Ray hides them from workers to which it gave none."""
    if config.launch.device != "auto":
        return config.launch.device
    import torch

    return (
        "cuda" if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) else "cpu"
    )


def quiet() -> None:
    """DeepSpeed and Megatron announce every step of their start-up; keep what a user can act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    os.environ.setdefault(
        "DS_ACCELERATOR", "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu"
    )
    for name in ("deepspeed", "DeepSpeed", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    run_job(job)


def job_to_json(job: Job) -> str:
    return json.dumps(dataclasses.asdict(job))


if __name__ == "__main__":
    main()
