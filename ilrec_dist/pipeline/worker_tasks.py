"""What the worker processes of a run do: train the CF models, train, evaluate,
recommend.

Each function takes plain JSON values, as `launch.job.Job` hands them over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ilrec_dist.cf.sasrec.cross_fit import train_cf, train_share
from ilrec_dist.cf.sasrec.sharded_table import ItemShard
from ilrec_dist.common.errors import Stopped
from ilrec_dist.common.run_layout import COUNTER
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import ParallelState, is_rank0
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.launch.device import quiet, resolve_device, set_cpu_threads
from ilrec_dist.launch.job import is_refused
from ilrec_dist.launch.placement import check_placement
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.cf_progress import cf_epochs, epochs_so_far
from ilrec_dist.pipeline.evaluate_baselines import evaluate_baselines
from ilrec_dist.pipeline.evaluate_trained import evaluate_trained
from ilrec_dist.pipeline.made_with import keep_valid
from ilrec_dist.pipeline.recommend_parts import Parts, rank_parts
from ilrec_dist.pipeline.train_one import train_one
from ilrec_dist.pipeline.trained_model import find_trained
from ilrec_dist.pipeline.usage import note_peak_memory
from ilrec_dist.reporting.counter import Count, write_counter
from ilrec_dist.training.exclusive import exclusive_folder
from ilrec_dist.training.spec import TrainingSpec


def train_and_evaluate(
    config: dict[str, Any], trainings: list[dict[str, Any]], evaluate: dict[str, str] | None
) -> None:
    """Train one (method, seed) after the other; then, if
    asked, evaluate all that is trained, and the baselines.

    evaluate: the fingerprints of the stages before
    the evaluation; None: it is not asked for.
    """
    tree = config_from_dict(config)
    with worker_session(tree) as parallel:
        artifacts = RunArtifacts(tree)
        for training in trainings:
            spec = TrainingSpec(**(training | {"folder": Path(training["folder"])}))
            train_one(tree, spec, artifacts, parallel)
            note_peak_memory(spec.folder, parallel)
        if evaluate is not None:
            # The evaluation's own folder may be removed while a killed command's last processes
            # still work.
            with exclusive_folder(artifacts.folders.trainings, tree.launch.lock_seconds):
                made_with = keep_valid(tree, artifacts, evaluate)
                evaluate_trained(tree, artifacts, parallel, made_with)
                evaluate_baselines(tree, artifacts, made_with)
                if is_rank0():
                    (artifacts.folders.evaluation / COUNTER).unlink(missing_ok=True)


def train_cf_part(config: dict[str, Any]) -> None:
    """Train the CF models with the item table split over the workers."""
    tree = config_from_dict(config)
    with worker_session(tree) as parallel:
        artifacts = RunArtifacts(tree)
        shard = ItemShard.of_process_group(artifacts.training.num_items)

        def show(done: float, text: str) -> None:
            if shard.is_rank0:
                count = Count("cf", done, cf_epochs(tree.cf), text)
                write_counter(artifacts.folders.cf_work / COUNTER, count)

        show(0, "")
        train_cf(
            tree.cf,
            artifacts.training,
            None,
            artifacts.folders.cf,
            epochs_so_far(show),
            parallel.device.type,
            shard,
        )


def train_cf_share(config: dict[str, Any]) -> None:
    """Train this worker's share of the CF models, which the driver puts together."""
    tree = config_from_dict(config)
    with worker_session(tree) as parallel:
        artifacts, rank = RunArtifacts(tree), dist.get_rank()
        work = artifacts.folders.cf_work

        def show(done: float, text: str) -> None:
            # No collective tells this worker that another one has met an error.
            if is_refused(work):
                raise Stopped
            count = Count("cf", done, cf_epochs(tree.cf), text)
            write_counter(work / f"{COUNTER}-{rank}", count)

        train_share(
            tree.cf,
            artifacts.training,
            artifacts.folders.cf,
            rank,
            dist.get_world_size(),
            epochs_so_far(show),
            parallel.device.type,
        )


def recommend_parts(config: dict[str, Any], method: str, seed: int, parts: dict[str, Any]) -> None:
    """Rank the parts of a request that are not finished."""
    tree, work = config_from_dict(config), Parts.from_json(parts)
    left = work.histories_of(work.missing())
    with worker_session(tree) as parallel:
        trained = find_trained(tree, method, seed).load(parallel)

        def show(done: int) -> None:
            if is_rank0():
                count = Count("recommend", min(done, left), left)
                write_counter(Path(work.folder) / COUNTER, count)

        rank_parts(trained, work, show)


@contextmanager
def worker_session(config: Config) -> Iterator[ParallelState]:
    """This process's device, threads and
    process groups, for the length of the block.
    """
    quiet()
    device = resolve_device(config.launch)
    # Beside a GPU too: Ray gives a worker that has no CPU of its own a single thread.
    set_cpu_threads(config.launch, int(os.environ.get("LOCAL_WORLD_SIZE", config.launch.workers)))
    parallel = initialize_parallel(
        config.launch.tp, device, timeout_seconds=config.launch.timeout_seconds
    )
    try:
        check_placement(config.launch, parallel)
        yield parallel
    finally:
        destroy_parallel()
