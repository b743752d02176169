"""What each stage of the pipeline does: loads what it needs from the run's folder and calls the one function that does the work."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.console import console
from ilrec_dist.common.files import read_json_object
from ilrec_dist.common.run_layout import COUNTER, RESULT, RunFolders
from ilrec_dist.config.load import dump_config
from ilrec_dist.config.tree import Config
from ilrec_dist.launch.cluster import cluster_address, ray_session
from ilrec_dist.pipeline.cf_progress import cf_epochs, epochs_so_far
from ilrec_dist.training.spec import TrainingSpec


def _for_workers(config: Config) -> dict[str, Any]:
    """The configuration as the workers read it, who have another working directory."""
    return config_to_dict(
        dataclasses.replace(config, runs_dir=str(Path(config.runs_dir).resolve()))
    )


def prepare_inputs(config: Config) -> list[Path]:
    from ilrec_dist.data.prepare import input_files

    return input_files(config.data)


def prepare(config: Config) -> None:
    """On a given Ray cluster (`launch.ray_address`) its nodes read the files of a folder together."""
    from ilrec_dist.data.prepare import input_files
    from ilrec_dist.data.prepare import prepare as prepare_data

    spread = (
        config.launch.engine == "ray"
        and cluster_address(config.launch) is not None
        and len(input_files(config.data)) > 1
    )
    with ray_session(config.launch) if spread else nullcontext():
        prepare_data(config.data, RunFolders(config.run_dir).data, spread)


def index_inputs(config: Config) -> list[Path]:
    from ilrec_dist.items.build import input_files

    return input_files(config.items)


def index(config: Config) -> None:
    from ilrec_dist.items.build import build_catalogue
    from ilrec_dist.items.index_report import index_summary
    from ilrec_dist.pipeline.artifacts import RunArtifacts

    artifacts = RunArtifacts(config)
    vectors = None
    if config.items.from_cf:
        from ilrec_dist.cf.sasrec.checkpoint import item_vectors

        vectors = item_vectors(artifacts.folders.cf)
    report = build_catalogue(config.items, artifacts.dataset, artifacts.folders.items, vectors)
    console.print(f"index: {index_summary(report)}", highlight=False, markup=False, soft_wrap=True)
    if report["warning"]:
        console.print(
            f"index: warning: {report['warning']}", highlight=False, markup=False, soft_wrap=True
        )


def cf(config: Config) -> None:
    if config.cf.split_table:
        return _cf_by_workers(config)
    import torch

    from ilrec_dist.cf.sasrec.cross_fit import train_cf
    from ilrec_dist.launch.device import resolve_device
    from ilrec_dist.pipeline.artifacts import RunArtifacts
    from ilrec_dist.reporting.progress import stage_progress

    artifacts = RunArtifacts(config)
    with stage_progress("cf", cf_epochs(config.cf), "epochs") as bar:
        device = (
            resolve_device(config.launch) if torch.cuda.is_available() else "cpu"
        )  # launch.device is the workers': this process may have no GPU
        train_cf(
            config.cf, artifacts.training, None, artifacts.folders.cf, epochs_so_far(bar), device
        )
    torch.cuda.empty_cache()  # the workers may share the GPU


def _cf_by_workers(config: Config) -> None:
    from ilrec_dist.launch.job import Job
    from ilrec_dist.launch.workers import run_workers
    from ilrec_dist.reporting.progress import follow_counter

    folders, stop = RunFolders(config.run_dir), threading.Event()
    shutil.rmtree(folders.cf_work, ignore_errors=True)
    thread = threading.Thread(
        target=follow_counter, args=(folders.cf_work / COUNTER, "cf", "epochs", stop), daemon=True
    )
    thread.start()
    try:
        with ray_session(config.launch):
            run_workers(
                config.launch,
                Job(
                    "ilrec_dist.pipeline.worker_tasks:train_cf_part",
                    {"config": _for_workers(config)},
                    str(folders.cf_work.resolve()),
                ),
            )
    finally:
        stop.set()
        thread.join()
        shutil.rmtree(folders.cf_work, ignore_errors=True)


def rewards(config: Config) -> None:
    """What rewards are computed from, for the codes that the index stage gave: the models know items, not codes."""
    from ilrec_dist.cf.rewards.index import write_code_order
    from ilrec_dist.pipeline.artifacts import RunArtifacts

    artifacts = RunArtifacts(config)
    write_code_order(config.cf, artifacts.folders.cf, artifacts.catalogue)


def train_and_evaluate(
    config: Config, trainings: Sequence[TrainingSpec], evaluate: bool
) -> list[float]:
    """Train one after the other and, if asked, evaluate all that is trained, in one worker group: starting one takes a while.

    Returns the seconds each training took, the group's start counted to the first, and last those of the evaluation.
    """
    from ilrec_dist.cf.rewards.service import reward_actor
    from ilrec_dist.launch.job import Job
    from ilrec_dist.launch.workers import run_workers
    from ilrec_dist.pipeline.artifacts import RunArtifacts
    from ilrec_dist.pipeline.stages.evaluate import evaluate_baselines
    from ilrec_dist.training.checkpoint import latest

    for training in trainings:
        found, damaged = latest(
            training.folder / "checkpoints", training.fingerprint
        )  # all damaged: refused here, before any process is started
        for line in damaged:
            console.print(
                f"warning: {line}; the checkpoint before it is used", highlight=False, markup=False
            )
        if found is not None:
            console.print(f"{training.title}: goes on from step {found.step}", highlight=False)
    wants_rewards = config.objective.crr_lambda > 0 and any(
        training.method == "ilrec" for training in trainings
    )
    began = time.time()
    folders = RunFolders(config.run_dir)
    actor = (
        reward_actor(config.cf, folders, config.data.both_directions)
        if wants_rewards and config.cf.rewards == "actor"
        else nullcontext()
    )
    job = Job(
        "ilrec_dist.pipeline.worker_tasks:train_and_evaluate",
        {
            "config": _for_workers(config),
            "trainings": [
                dataclasses.asdict(training) | {"folder": str(training.folder.resolve())}
                for training in trainings
            ],
            "evaluate": evaluate,
        },
        str(folders.trainings.resolve()),
    )
    with actor, following(config, trainings, evaluate):
        run_workers(config.launch, job)
    seconds, at = [], began
    for training in trainings:
        result = training.folder / RESULT
        end = result.stat().st_mtime
        over_all_attempts = read_json_object(result)["seconds"]
        seconds.append(
            max(end - at, over_all_attempts)
        )  # an earlier attempt may have done most of it, or all
        at = max(at, end)
    if evaluate:
        evaluate_baselines(config, RunArtifacts(config))
        seconds.append(time.time() - at)
    return seconds


@contextmanager
def following(config: Config, trainings: Sequence[TrainingSpec], evaluate: bool) -> Iterator[None]:
    """Show the progress of each training in turn, and of the evaluation, while the block runs the workers."""
    from ilrec_dist.pipeline.artifacts import RunArtifacts
    from ilrec_dist.reporting.progress import LiveProgress, follow_counter
    from ilrec_dist.samples.windows import steps_per_epoch, training_windows
    from ilrec_dist.training.schedule import warmup_warning

    windows = training_windows(
        RunArtifacts(config).training, config.train.max_history, config.train.targets
    )
    steps = steps_per_epoch(windows, config.train.batch_size) * config.train.epochs
    if trainings and (warning := warmup_warning(config.train, steps)) is not None:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    stop = threading.Event()

    def follow() -> None:
        for training in trainings:
            with LiveProgress(training.folder, steps, training.title) as progress:
                while not (training.folder / RESULT).exists():
                    if stop.wait(0.3):
                        progress.finished = (training.folder / RESULT).exists()
                        break
            if stop.is_set():
                return
        if evaluate:
            follow_counter(
                RunFolders(config.run_dir).evaluation / COUNTER, "evaluate", "rankings", stop
            )

    thread = threading.Thread(target=follow, name="following", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def report(config: Config, stage_seconds: dict[str, float]) -> None:
    from ilrec_dist.pipeline.artifacts import RunArtifacts
    from ilrec_dist.pipeline.report_material import report_material
    from ilrec_dist.pipeline.stages.evaluate import (
        collect_examples,
        collect_figures,
        method_labels,
        paired_intervals,
    )
    from ilrec_dist.reporting.html.curves import MethodMetrics
    from ilrec_dist.reporting.html.report import write_report
    from ilrec_dist.reporting.metrics_log import read_metrics
    from ilrec_dist.reporting.results import RESULTS_FILE, print_table, write_results

    artifacts = RunArtifacts(config)
    figures = collect_figures(config, artifacts)
    rows, intervals = [one.row for one in figures], paired_intervals(config, figures)
    trained = [(method, seed) for method in config.train.methods for seed in config.train.seeds]
    dataset_name = Path(config.data.path).name if config.data.path else "synthetic"
    results = write_results(
        config.run_dir / RESULTS_FILE,
        dataset_name,
        rows,
        sum(stage_seconds.values()),
        stage_seconds,
        intervals=intervals,
    )
    print_table(rows, intervals, method_labels())
    path = write_report(
        config.run_dir,
        name=config.name,
        results=results,
        metrics=[
            MethodMetrics(method, seed, read_metrics(artifacts.folders.training(method, seed)))
            for method, seed in trained
        ],
        labels=method_labels(),
        examples=collect_examples(config, artifacts),
        config_yaml=dump_config(config),
        **report_material(config, artifacts),
    )
    shares = " · ".join(f"{name} {seconds:.0f} s" for name, seconds in stage_seconds.items())
    console.print(
        f"{shares}\nresults: {config.run_dir / RESULTS_FILE}   report: {path}",
        highlight=False,
        markup=False,
    )
