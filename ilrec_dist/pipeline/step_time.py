"""Times a few steps of trainings, and a few users
of their search, to tell how long they take.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from ilrec_dist.config.load import drop_idle_keys
from ilrec_dist.config.tree import Config
from ilrec_dist.launch.cluster import ray_session
from ilrec_dist.launch.job import Job
from ilrec_dist.launch.workers import run_workers
from ilrec_dist.pipeline.artifacts import config_for_workers, with_local_model, worker_inputs

# What the workers leave in the folder.
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
    configs = [
        drop_idle_keys(_rewards_in_process(with_local_model(config)))[0] for config in configs
    ]
    arguments = {
        "configs": [config_for_workers(config) for config in configs],
        "folder": str(folder.resolve()),
    }
    reads = sorted({path for config in configs for path in worker_inputs(config)})
    job = Job("ilrec_dist.pipeline.timed_steps:time_here", arguments, str(folder.resolve()), reads)
    began = time.monotonic()
    with ray_session(configs[0].launch):
        run_workers(configs[0].launch, job)
    measured = json.loads((folder / TIMES).read_text(encoding="utf-8"))
    start = time.monotonic() - began - measured["seconds"]
    return [
        None if times is None else TrainingTime(times["step"], times["user"], start)
        for times in measured["trainings"]
    ]


def _rewards_in_process(config: Config) -> Config:
    """No reward actor runs while steps are timed."""
    return dataclasses.replace(config, cf=dataclasses.replace(config.cf, rewards="in_process"))
