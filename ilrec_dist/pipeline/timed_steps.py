"""Times a few steps of trainings, in every worker process."""

from __future__ import annotations

import dataclasses
import time
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import write_json
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import ParallelState, is_rank0
from ilrec_dist.evaluation.ranking import evaluate_model
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.backbones import initial_backbone
from ilrec_dist.pipeline.prompting import input_form, served_prompt
from ilrec_dist.pipeline.rankers import evaluation_ranker
from ilrec_dist.pipeline.step_time import TIMES
from ilrec_dist.pipeline.train_one import train_one
from ilrec_dist.pipeline.worker_tasks import worker_session
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.training.spec import TrainingSpec

# The first step of a training is slower than the others, and is not counted.
STEPS = 4


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
    # The training ends at its first checkpoint (TrainConfig.steps_between_checkpoints).
    short = dataclasses.replace(
        config, train=dataclasses.replace(config.train, checkpoint_steps=2 * STEPS)
    )
    spec = TrainingSpec(method, seed, folder, "")
    try:
        with suppress(_Enough):
            train_one(short, spec, artifacts, parallel, log_steps=1, on_checkpoint=_stop)
    except UserError:
        # The cell itself will say what is wrong.
        return None
    steps = [line["time/all"] for line in read_metrics(folder) if "time/all" in line]
    backbone = initial_backbone(config, artifacts, seed).to(parallel.device).eval()
    users = artifacts.dataset.evaluated("validation")[: config.evaluation.batch_size * parallel.dp]
    ranker = evaluation_ranker(
        config,
        artifacts,
        backbone,
        softmax_scope=get_method(method).objective(config.objective).softmax_scope,
        inputs=input_form(config, artifacts, served_prompt(config)),
        parallel=parallel,
    )
    began = time.monotonic()
    evaluate_model(
        ranker,
        artifacts.dataset,
        users=users,
        split="validation",
        exclude_seen=config.evaluation.exclude_seen,
    )
    return {
        "step": fmean(steps[1:] or steps),
        "user": (time.monotonic() - began) / max(1, len(users)),
    }
