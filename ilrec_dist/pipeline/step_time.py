"""Times a few steps of trainings, and a few users
of their search, to tell how long they take.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import write_json
from ilrec_dist.config.load import config_from_dict, drop_idle_keys
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.evaluation.ranking import evaluate_model
from ilrec_dist.launch.cluster import ray_session
from ilrec_dist.launch.job import Job
from ilrec_dist.launch.workers import run_workers
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import (
    RunArtifacts,
    build_backbone,
    config_for_workers,
    with_local_model,
    worker_inputs,
)
from ilrec_dist.pipeline.prompting import input_form, served_prompt
from ilrec_dist.pipeline.train_one import train_one
from ilrec_dist.pipeline.worker_tasks import worker_session
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.training.spec import TrainingSpec
from ilrec_dist.training.trainer import is_rank0

# The first step of a training is slower than the others, and is not counted.
STEPS = 4
TIMES = "times.json"


@dataclasses.dataclass(frozen=True)
class TrainingTime:
    """What was measured of one training, in seconds."""

    step: float
    # Of the search, for each user.
    user: float
    # From the start of the worker group until it works.
    start: float


def time_trainings(configs: Sequence[Config], folder: Path) -> list[TrainingTime | None]:
    """Time the last method and first seed of each configuration, in one worker group.

    The configurations have one section `launch` and run folders with data, codes and
    CF models. `folder` is for what the trainings write, and is left to the caller.
    None for a training that cannot begin yet, as one that goes on from another.
    """
    configs = [drop_idle_keys(_rewards_in_process(with_local_model(one)))[0] for one in configs]
    arguments = {
        "configs": [config_for_workers(config) for config in configs],
        "folder": str(folder.resolve()),
    }
    reads = sorted({path for config in configs for path in worker_inputs(config)})
    job = Job("ilrec_dist.pipeline.step_time:time_here", arguments, str(folder.resolve()), reads)
    began = time.monotonic()
    with ray_session(configs[0].launch):
        run_workers(configs[0].launch, job)
    measured = json.loads((folder / TIMES).read_text(encoding="utf-8"))
    start = time.monotonic() - began - measured["seconds"]
    return [
        None if one is None else TrainingTime(one["step"], one["user"], start)
        for one in measured["trainings"]
    ]


def _rewards_in_process(config: Config) -> Config:
    """No reward actor runs while steps are timed."""
    return dataclasses.replace(config, cf=dataclasses.replace(config.cf, rewards="in_process"))


def time_here(configs: list[dict[str, Any]], folder: str) -> None:
    """Time the trainings in this worker; the first rank writes the times."""
    began = time.monotonic()
    trees = [config_from_dict(config) for config in configs]
    with worker_session(trees[0]) as parallel:
        times = [
            _time_training(config, Path(folder) / str(number), parallel)
            for number, config in enumerate(trees)
        ]
        if is_rank0():
            seconds = time.monotonic() - began
            write_json(Path(folder) / TIMES, {"trainings": times, "seconds": seconds})


class _Enough(Exception):
    """Ends a training whose steps are timed."""


def _stop(step: int) -> None:
    raise _Enough


def _time_training(
    config: Config, folder: Path, parallel: ParallelState
) -> dict[str, float] | None:
    method, seed = config.train.methods[-1], config.train.seeds[0]
    artifacts = RunArtifacts(config)
    short = dataclasses.replace(
        config, train=dataclasses.replace(config.train, checkpoint_steps=STEPS)
    )
    spec = TrainingSpec(method, seed, folder, "")
    try:
        with suppress(_Enough):
            train_one(short, spec, artifacts, parallel, log_steps=1, on_checkpoint=_stop)
    except UserError:
        # The cell itself will say what is wrong.
        return None
    steps = [line["time/all"] for line in read_metrics(folder) if "time/all" in line]
    backbone = build_backbone(config, artifacts, seed).to(parallel.device).eval()
    users = artifacts.dataset.evaluated("validation")[: config.evaluation.batch_size * parallel.dp]
    began = time.monotonic()
    evaluate_model(
        backbone,
        artifacts.dataset,
        artifacts.catalogue,
        artifacts.trie,
        users=users,
        split="validation",
        config=config.evaluation,
        softmax_scope=get_method(method).objective(config.objective).softmax_scope,
        inputs=input_form(config, artifacts, served_prompt(config)),
        parallel=parallel,
    )
    return {
        "step": fmean(steps[1:] or steps),
        "user": (time.monotonic() - began) / max(1, len(users)),
    }
