"""The stages of the workers: every training of
the run and, in the same group, the evaluation.

Starting a worker group takes a while, so one does all that is due.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ilrec_dist.cf.rewards.service import reward_actor
from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.console import console, print_plain
from ilrec_dist.common.files import read_json_object
from ilrec_dist.common.run_layout import BEST, COUNTER, FINAL, RESULT, RunFolders
from ilrec_dist.config.tree import Config, check_together
from ilrec_dist.launch.cluster_check import worker_nodes
from ilrec_dist.launch.job import Job
from ilrec_dist.launch.workers import run_workers
from ilrec_dist.model.decoder import check_positions
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.model.hf.expected import check_tensors
from ilrec_dist.model.hf.source import weight_files
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import (
    RunArtifacts,
    config_for_workers,
    item_titles,
    longest_input,
    with_local_model,
    worker_inputs,
)
from ilrec_dist.pipeline.method_settings import training_settings
from ilrec_dist.pipeline.prompting import check_prompts, epoch_steps, template_files
from ilrec_dist.pipeline.stage import Stage, training_name
from ilrec_dist.reporting.progress import LiveProgress, follow_counter, following
from ilrec_dist.reporting.trackers import require_tracker
from ilrec_dist.training.checkpoint import latest
from ilrec_dist.training.schedule import warmup_warning
from ilrec_dist.training.spec import TrainingSpec


def training_stages(config: Config) -> list[Stage]:
    # Those that begin with another method's weights come after it.
    methods = sorted(config.train.methods, key=lambda name: bool(get_method(name).starts_from))
    return [
        _training_stage(config, method, seed) for method in methods for seed in config.train.seeds
    ]


def _training_stage(config: Config, name: str, seed: int) -> Stage:
    method = get_method(name)
    # The method's own objective: a setting that does not reach it does not run it again.
    effective = dataclasses.replace(
        config,
        objective=method.objective(config.objective),
        preference=method.preference(config.preference),
    )
    settings = stage_settings(effective, "train")
    if method.samples == "targets":
        del settings["preference"]
    folder = RunFolders(config.run_dir).training(name, seed)
    after = ["index"]
    needs_rewards = method.needs_rewards(config.objective)
    if needs_rewards or method.needs_flips:
        after.append("cf")
    if needs_rewards:
        after.append("rewards")
    if method.starts_from is not None:
        after.append(training_name(method.starts_from, seed))
    return Stage(
        training_name(name, seed),
        "train",
        after=tuple(after),
        settings=settings | {"method": name, "seed": seed},
        inputs=lambda: _model_files(config) + template_files(config),
        output=folder,
        training=TrainingSpec(name, seed, folder, ""),
        required=(BEST, FINAL, RESULT),
    )


def _model_files(config: Config) -> list[Path]:
    return [] if config.backbone.from_ is None else weight_files(config.backbone.from_)


def train_and_evaluate(
    config: Config, trainings: Sequence[TrainingSpec], evaluate: Mapping[str, str] | None
) -> list[float]:
    """Train one after the other and, if asked,
    evaluate all that is trained, in one worker group.

    evaluate: the fingerprints of the stages before the
    evaluation; None: it is not asked for.

    Returns the seconds that each training took, the group's
    start counted to the first, and last those of the evaluation.
    """
    if trainings or config.train.trainable != "full":
        config = with_local_model(config)
    if trainings:
        check_trainings(config)
    trainings = _announced(trainings)
    folders = RunFolders(config.run_dir)
    needs_rewards = any(
        get_method(training.method).needs_rewards(config.objective) for training in trainings
    )
    actor = (
        reward_actor(
            config.cf,
            folders,
            config.data.both_directions,
            worker_nodes(config.launch),
            config.launch.timeout_seconds,
        )
        if needs_rewards and config.cf.rewards == "actor"
        else nullcontext()
    )
    specs = [
        dataclasses.asdict(training) | {"folder": str(training.folder.resolve())}
        for training in trainings
    ]
    job = Job(
        "ilrec_dist.pipeline.worker_tasks:train_and_evaluate",
        {
            "config": config_for_workers(config),
            "trainings": specs,
            "evaluate": None if evaluate is None else dict(evaluate),
        },
        str(folders.trainings.resolve()),
        worker_inputs(config),
    )
    began = time.time()
    with actor, _following(config, trainings, evaluate is not None):
        run_workers(config.launch, job)
    seconds, at = [], began
    for training in trainings:
        result = training.folder / RESULT
        end = result.stat().st_mtime
        # An earlier attempt may have done most of it, or all.
        over_all_attempts = read_json_object(result)["seconds"]
        seconds.append(max(end - at, over_all_attempts))
        at = max(at, end)
    if evaluate is not None:
        seconds.append(time.time() - at)
    return seconds


def check_trainings(config: Config) -> None:
    """Raise UserError, before any process is started, where
    nothing can be trained so. The index is there already.
    """
    if config.train.tracker is not None:
        require_tracker(config.train.tracker)
    config = with_local_model(config)
    if config.backbone.from_ is None:
        return
    check_together(config, f"backbone.from {config.backbone.from_}")
    check_tensors(config.backbone.from_)
    artifacts = RunArtifacts(config)
    if config.prompts.templates is not None:
        check_prompts(config, artifacts)
    else:
        check_positions(
            read_config(config.backbone.from_), longest_input(config, artifacts.catalogue)
        )
    if config.backbone.new_tokens == "text":
        item_titles(artifacts)


def _announced(trainings: Sequence[TrainingSpec]) -> list[TrainingSpec]:
    """Say where each training goes on; the trainings,
    with what was said of damaged checkpoints.

    Raises UserError where all its checkpoints
    are damaged, before any process is started.
    """
    announced = []
    for training in trainings:
        # As the workers name it.
        folder = training.folder.resolve() / "checkpoints"
        checkpoint, damaged = latest(folder, training.fingerprint)
        announced.append(dataclasses.replace(training, reported_damage=damaged))
        for line in damaged:
            print_plain(f"warning: {line}; the checkpoint before it is used")
        if checkpoint is not None:
            line = f"{training.title}: goes on from step {checkpoint.step}"
            console.print(line, highlight=False)
    return announced


@contextmanager
def _following(config: Config, trainings: Sequence[TrainingSpec], evaluate: bool) -> Iterator[None]:
    """Show the progress of each training in turn,
    then of the evaluation, during the block.
    """
    per_epoch = epoch_steps(config, RunArtifacts(config))
    steps_of = {
        training.method: per_epoch * training_settings(config, get_method(training.method)).epochs
        for training in trainings
    }
    steps = min(steps_of.values(), default=0)
    if trainings and (warning := warmup_warning(config.train, steps)) is not None:
        print_plain(f"warning: {warning}")

    def follow(stop: threading.Event) -> None:
        for training in trainings:
            steps = steps_of[training.method]
            with LiveProgress(training.folder, steps, training.title) as progress:
                while not (training.folder / RESULT).exists():
                    if stop.wait(0.3):
                        progress.finished = (training.folder / RESULT).exists()
                        break
            if stop.is_set():
                return
        if evaluate:
            counter = RunFolders(config.run_dir).evaluation / COUNTER
            follow_counter(counter, "rankings", stop)

    with following(follow):
        yield
