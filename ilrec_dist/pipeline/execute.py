"""Runs the stages of a command in order: those that are not current, and no others.

A command that is refused leaves finished work in the run's folder as it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from ilrec_dist.common.console import console, print_plain
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.run_layout import CONFIG, CONFIG_SHA256, RunFolders
from ilrec_dist.config.load import dump_config
from ilrec_dist.config.tree import Config
from ilrec_dist.launch.cluster import is_on_named_cluster, ray_session
from ilrec_dist.launch.cluster_check import check_cluster, check_nodes
from ilrec_dist.pipeline.artifacts import dequantised_models, known_worker_inputs
from ilrec_dist.pipeline.preserved import Preserved
from ilrec_dist.pipeline.records import damaged_files, read_record, verify_descriptions
from ilrec_dist.pipeline.run import Run
from ilrec_dist.pipeline.stage import Stage
from ilrec_dist.pipeline.stages.baselines import baseline_stages
from ilrec_dist.pipeline.stages.cf import cf_stage
from ilrec_dist.pipeline.stages.evaluate import evaluate_stage
from ilrec_dist.pipeline.stages.index import index_stage
from ilrec_dist.pipeline.stages.prepare import prepare_stage, spread_files
from ilrec_dist.pipeline.stages.report import report
from ilrec_dist.pipeline.stages.rewards import rewards_stage
from ilrec_dist.pipeline.stages.train import (
    check_trainings,
    train_and_evaluate,
    training_stages,
)


def stages(config: Config) -> list[Stage]:
    """The run's stages, each after those it stands on."""
    models = [index_stage(config), cf_stage(config)]
    if config.items.from_cf:
        models.reverse()
    trainings = training_stages(config)
    return [
        prepare_stage(config),
        *models,
        rewards_stage(config),
        *baseline_stages(config),
        *trainings,
        evaluate_stage(config, [training.name for training in trainings]),
    ]


def open_run(config: Config, verify: bool = False) -> Run:
    return Run(config.run_dir, stages(config), dump_config(config), verify)


def execute(config: Config, command: str, resume: bool = False, verify: bool = False) -> None:
    """Run the stages of one command, or with "run" all of them and the report.

    resume: refuse a folder of another configuration. verify: compare the finished
    stages' files with their hashes; without it, with their sizes and times.
    """
    run = open_run(config, verify)
    if resume:
        run.check_resumable()
    names = [stage.name for stage in run.stages.values() if command in ("run", stage.command)]
    # Input files are looked for before anything runs.
    for name in names:
        run.stages[name].inputs()
    for name in names:
        run.check_before(name, names)
    with run.alone():
        executor = Executor(run, config)
        with executor.unchanged_if_refused():
            executor.execute(names)
            run.mend_config()
            if command in ("run", "evaluate"):
                report(config, run.stage_seconds())


class Executor:
    """Runs stages in one run folder, which the caller holds."""

    def __init__(self, run: Run, config: Config) -> None:
        self.run, self.config = run, config
        self.preserved = Preserved(run.folder)
        # Stages that were begun, in order, and those of them that go on with unfinished work.
        self._begun: list[str] = []
        self._continued: set[str] = set()

    def execute(self, names: Sequence[str]) -> None:
        self._put_back_what_is_wanted()
        of_workers = [name for name in names if self.run.stages[name].run is None]
        # One Ray session for all stages, where one is needed at all.
        needs_workers = any(not self.run.is_current(name) for name in of_workers)
        launch = self.config.launch
        with ray_session(launch) if needs_workers else nullcontext():
            if needs_workers and is_on_named_cluster(launch):
                self._check_cluster(names)
            for is_workers, group in itertools.groupby(names, key=lambda name: name in of_workers):
                if is_workers:
                    self._execute_by_workers(list(group))
                else:
                    for name in group:
                        self._execute_here(name)
                        if name == "index" and not self.run.is_current("cf"):
                            self._check_trainings(of_workers)

    def _check_trainings(self, names: Sequence[str]) -> None:
        """Refuse trainings that cannot begin, before
        the CF model is trained for them.
        """
        stages = [self.run.stages[name] for name in names]
        if any(stage.training is not None for stage in stages):
            check_trainings(self.config)

    def _check_cluster(self, names: Sequence[str]) -> None:
        """Refuse a cluster that cannot run the workers, before the first stage."""
        reads = known_worker_inputs(self.config)
        if "prepare" in names and not self.run.is_current("prepare"):
            reads += [str(path.resolve()) for path in spread_files(self.config)]
        check_cluster(self.config.launch, self.run.folder, reads)
        models = dequantised_models(self.config)
        if models is not None:
            check_nodes(models)

    @contextmanager
    def unchanged_if_refused(self) -> Iterator[None]:
        """Put finished work back where the block
        raises UserError; drop it where it ends well.
        """
        try:
            yield
        except UserError:
            if self.preserved.outputs:
                new = [name for name in self._begun if self._is_new_training(name)]
                staying = self._continued | set(new)
                written = [name for name in self._begun if name not in staying]
                self.preserved.put_back([self.run.stages[name].output for name in written], new)
            else:
                self.preserved.drop()
            # A folder in which nothing was finished vanishes again.
            for folder in (self.run.state_folder, self.run.folder):
                with suppress(OSError):
                    folder.rmdir()
            raise
        if self._begun or not self.preserved.outputs:
            self.preserved.drop()

    def _is_new_training(self, name: str) -> bool:
        """Whether a stage's work of this command
        stays although a later stage is refused.

        It is a training that replaced nothing and stands on nothing
        that is put back. What goes on with unfinished work stays too.
        """
        stage = self.run.stages[name]
        is_kept = stage.output.relative_to(self.run.folder).as_posix() in self.preserved.outputs
        is_new = name not in self._continued and not is_kept
        return stage.training is not None and is_new and not self._stands_on_begun(name)

    def _stands_on_begun(self, name: str) -> bool:
        return any(
            before in self._begun or self._stands_on_begun(before)
            for before in self.run.stages[name].after
        )

    def _execute_here(self, name: str) -> None:
        self.run.check_before(name, [])
        reason = self.run.reason_to_run(name)
        if reason is None:
            _say_unchanged(name)
            return
        _say_damaged(name, reason)
        self._verify_before(name, [])
        run = self.run.stages[name].run
        assert run is not None
        with self._as_before_if_refused(name):
            self._begin(name)
            began = time.monotonic()
            # The new output takes the place of the old one at the end, whole.
            summary = run()
            self._finish(name, time.monotonic() - began, summary)

    def _execute_by_workers(self, names: Sequence[str]) -> None:
        pending: list[str] = []
        for name in names:
            self.run.check_before(name, pending)
            reason = self.run.reason_to_run(name)
            if reason is None and not set(self.run.stages[name].after) & set(pending):
                _say_unchanged(name)
            else:
                _say_damaged(name, reason or "")
                pending.append(name)
        if not pending:
            return
        for name in pending:
            self._verify_before(name, pending)
        for name in pending:
            self._clear_other_work(name)
        trainings = [
            dataclasses.replace(spec, fingerprint=self.run.fingerprint(name))
            for name in pending
            if (spec := self.run.stages[name].training) is not None
        ]
        evaluations = [name for name in pending if self.run.stages[name].training is None]
        evaluate = self.run.fingerprints_before(evaluations[0]) if evaluations else None
        with ray_session(self.config.launch):
            seconds = train_and_evaluate(self.config, trainings, evaluate)
        for name, spent in zip(pending, seconds, strict=True):
            self._finish(name, spent, None)

    def _verify_before(self, name: str, coming: Sequence[str]) -> None:
        """Compare the manifests of all stages before
        this one, except `coming`, with the records.

        What a stage reads is compared with these manifests where it is read.
        """
        for before in self.run.stages[name].after:
            if before not in coming:
                verify_descriptions(RunFolders(self.run.folder), before)
            self._verify_before(before, coming)

    def _begin(self, name: str) -> None:
        """Keep the stage's finished output, if there
        is one, and note that an attempt begins.

        The checkpoints of an unfinished training
        are kept too, unless it goes on from them.
        """
        if not self._begun:
            self.preserved.note()
        stage = self.run.stages[name]
        is_finished = read_record(self.run.record_file(name)) is not None
        is_dropped = name not in self._continued and _has_checkpoints(stage.output)
        if stage.output.exists() and (is_finished or is_dropped):
            self.preserved.keep(stage.output)
        self._begun.append(name)
        self.run.begin(name)

    def _finish(self, name: str, seconds: float, summary: str | None) -> None:
        self.run.finish(name, seconds)
        console.print(f"[bold]{name}[/bold]: done in {seconds:.1f} s")
        if summary:
            print_plain(f"  {summary}")

    @contextmanager
    def _as_before_if_refused(self, name: str) -> Iterator[None]:
        """Where the stage refuses its input, take
        back what was noted about this attempt.
        """
        files = [
            self.run.folder / CONFIG,
            self.run.state_folder / CONFIG_SHA256,
            self.run.begun_file(name),
        ]
        before = {path: path.read_bytes() if path.exists() else None for path in files}
        try:
            yield
        except UserError:
            for path, content in before.items():
                if content is None:
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(content)
            self._begun.remove(name)
            raise

    def _clear_other_work(self, name: str) -> None:
        """Begin a stage of the workers: work of
        other settings goes, and what is damaged.

        The unfinished work of an interrupted attempt with these settings stays,
        to be continued. So does what an evaluation has made: its workers keep
        what is valid of it.
        """
        output, begun = self.run.stages[name].output, self.run.begun(name)
        record = read_record(self.run.record_file(name))
        finished = self.run.record_file(name).exists()
        continues = begun is not None and begun["fingerprint"] == self.run.fingerprint(name)
        changed = self.run.changed_settings(name)
        if continues and not finished:
            self._continued.add(name)
        self._begin(name)
        if name in self._continued:
            return
        if not finished and _has_checkpoints(output):
            _warn(
                f"{name}: the checkpoints of its unfinished work are dropped, which was "
                f"of another configuration or other input{changed}; --resume refuses instead"
            )
        elif finished and not continues and self.run.stages[name].training is not None:
            _warn(
                f"{name}: what it had trained is replaced, which was of another configuration or "
                f"other input{changed}; another name keeps both, and --resume refuses instead"
            )
        self.run.record_file(name).unlink(missing_ok=True)
        if self.run.stages[name].training is not None:
            shutil.rmtree(output, ignore_errors=True)
        elif record is not None:
            for file in damaged_files(output, record, self.run.verify):
                (output / file).unlink(missing_ok=True)

    def _put_back_what_is_wanted(self) -> None:
        """Put back finished work of these settings that an interrupted command kept."""
        kept = set(self.preserved.outputs)
        if not kept:
            return
        root = RunFolders(self.run.folder).root
        for name, stage in self.run.stages.items():
            if stage.output.relative_to(root).as_posix() in kept:
                # Unfinished work has only the record of its beginning.
                record = read_record(self.preserved.records / f"{name}.json") or read_record(
                    self.preserved.records / f"{name}.begun.json"
                )
                if record is None or record["fingerprint"] != self.run.fingerprint(name):
                    return
                kept.remove(stage.output.relative_to(root).as_posix())
        if not kept:
            self.preserved.put_back([])
            console.print("the finished work of this configuration is put back", highlight=False)


def _has_checkpoints(output: Path) -> bool:
    return any(output.glob("checkpoints/step-*"))


def _warn(line: str) -> None:
    print_plain(f"warning: {line}")


def _say_unchanged(name: str) -> None:
    console.print(f"[dim]{name}: unchanged, not run again[/dim]")


def _say_damaged(name: str, reason: str) -> None:
    if reason.startswith("is damaged"):
        line = f"{name}: {reason}; made again"
        print_plain(line)
