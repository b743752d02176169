"""The cf stage: the collaborative-filtering models, trained here, by the workers of a
named cluster side by side, or by the workers together.
"""

from __future__ import annotations

import shutil
from functools import partial

import torch

from ilrec_dist.cf.sasrec.checkpoint import read_report
from ilrec_dist.cf.sasrec.cross_fit import train_cf
from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.errors import WorkersFailed
from ilrec_dist.common.run_layout import COUNTER, RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.launch.cluster import is_on_named_cluster, ray_session
from ilrec_dist.launch.device import resolve_device
from ilrec_dist.launch.job import Job
from ilrec_dist.launch.workers import run_workers
from ilrec_dist.pipeline.artifacts import RunArtifacts, config_for_workers
from ilrec_dist.pipeline.cf_progress import cf_epochs, epochs_so_far
from ilrec_dist.pipeline.stage import Stage
from ilrec_dist.reporting.counter import Count, write_counter
from ilrec_dist.reporting.progress import follow_counter, following, stage_progress


def cf_stage(config: Config) -> Stage:
    return Stage(
        "cf",
        "cf",
        after=("prepare",),
        settings=stage_settings(config, "cf"),
        output=RunFolders(config.run_dir).cf,
        run=lambda: train_cf_models(config),
    )


def train_cf_models(config: Config) -> str | None:
    """Train all models; returns what the full one came to."""
    # Of workers that failed: this command may have none.
    shutil.rmtree(RunFolders(config.run_dir).cf_work, ignore_errors=True)
    if config.cf.split_table:
        train_by_workers(config, "train_cf_part")
    else:
        train_here(config)
    models = read_report(RunFolders(config.run_dir).cf)["models"]
    full = models["full"]
    return (
        f"{len(models)} models; the full one: {full['users']:,} users, validation NDCG@10 "
        f"{full['validation_ndcg@10']:.4f} after {full['best_epoch']} epochs"
    )


def train_here(config: Config) -> None:
    """Train what the workers do not train side by side, and complete the folder."""
    artifacts = RunArtifacts(config)
    # launch.device is that of the workers; this process may have no GPU where they have.
    device = resolve_device(config.launch) if torch.cuda.is_available() else "cpu"
    train = partial(train_cf, config.cf, artifacts.training, None, artifacts.folders.cf)
    if is_side_by_side(config):
        train(device=device, train_elsewhere=lambda: train_by_workers(config, "train_cf_share"))
    else:
        total, counter = cf_epochs(config.cf), artifacts.folders.cf_work / COUNTER
        with stage_progress("cf", total, "epochs") as show_progress:

            def show(done: float, text: str) -> None:
                show_progress(done, text)
                write_counter(counter, Count("cf", done, total, text))

            try:
                train(epochs_so_far(show), device)
            finally:
                shutil.rmtree(counter.parent, ignore_errors=True)
    # The workers may share the GPU.
    torch.cuda.empty_cache()


def is_side_by_side(config: Config) -> bool:
    """Whether each worker trains some of the models.

    Only where there is a named cluster: on one machine the
    cores are busy already, and starting workers takes a while.
    """
    launch = config.launch
    return is_on_named_cluster(launch) and launch.workers > 1 and config.cf.cf_folds > 1


def train_by_workers(config: Config, task: str) -> None:
    """Have the workers train by one of `worker_tasks`; their epochs are shown here."""
    folders = RunFolders(config.run_dir)
    job = Job(
        f"ilrec_dist.pipeline.worker_tasks:{task}",
        {"config": config_for_workers(config)},
        str(folders.cf_work.resolve()),
    )
    follow = partial(follow_counter, folders.cf_work / COUNTER, "epochs")
    try:
        with following(follow), ray_session(config.launch):
            run_workers(config.launch, job)
    except WorkersFailed:
        # Its message may name the file there with the traceback.
        raise
    except BaseException:
        shutil.rmtree(folders.cf_work, ignore_errors=True)
        raise
    shutil.rmtree(folders.cf_work, ignore_errors=True)
