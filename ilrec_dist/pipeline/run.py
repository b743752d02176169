"""The stages in order. Each writes a folder; a stage whose input bytes and relevant settings are unchanged is not run again."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ilrec_dist.cf.config import CF_SERVING
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.console import console
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import sha256_file
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.config.load import dump_config
from ilrec_dist.config.tree import Config
from ilrec_dist.launch.cluster import ray_session
from ilrec_dist.pipeline import stage_runs
from ilrec_dist.training.spec import TrainingSpec

FORMAT = 4  # raise when a stage's output changes for the same settings


@dataclass(frozen=True)
class Stage:
    """One step of the run. `settings` and `inputs` and the stages in `after` decide whether it must run again."""

    name: str
    command: str  # the `ilrec` command that runs it
    after: tuple[str, ...]
    settings: Callable[[Config], Any]
    inputs: Callable[[Config], list[Path]]
    output: Callable[[Config], Path]
    run: Callable[[Config], None] | None = None  # None: a stage of the workers, which run together
    training: TrainingSpec | None = None  # what a training stage trains


class Run:
    """A run's folder and the state of its stages."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = config.run_dir
        self.stages = {stage.name: stage for stage in stages(config)}
        self._fingerprints: dict[str, str] = {}

    def fingerprint(self, name: str) -> str:
        """SHA-256 over the stage's settings, its inputs' bytes and the fingerprints of the stages before it."""
        if name not in self._fingerprints:
            stage = self.stages[name]
            parts = {
                "format": FORMAT,
                "settings": stage.settings(self.config),
                "inputs": [(path.name, sha256_file(path)) for path in stage.inputs(self.config)],
                "after": [self.fingerprint(before) for before in stage.after],
            }
            self._fingerprints[name] = hashlib.sha256(
                json.dumps(parts, sort_keys=True).encode()
            ).hexdigest()
        return self._fingerprints[name]

    def record(self, name: str) -> dict[str, Any] | None:
        """What the stage's last complete run left behind: fingerprint and seconds. None when there was none, when its output is gone, or when a
        later attempt with other settings or input was killed: whose output lies there then is not known."""
        record, begun = _read(self._record_file(name)), _read(self._record_file(name, begun=True))
        if (
            record is None
            or not self.stages[name].output(self.config).exists()
            or (begun is not None and begun["fingerprint"] != record["fingerprint"])
        ):
            return None
        return record

    def is_current(self, name: str) -> bool:
        record = self.record(name)
        return record is not None and record["fingerprint"] == self.fingerprint(name)

    def execute(self, *names: str) -> None:
        """Run those of the stages that are not current, and note that they are. Several names are stages of the workers, which share one group."""
        pending: list[str] = []
        for name in names:
            self.check_before(name, pending)
            if self.is_current(name):
                console.print(f"[dim]{name}: unchanged, not run again[/dim]")
            else:
                pending.append(name)
        if not pending:
            return
        run = self.stages[pending[0]].run
        if run is None:
            self._begin()
            for name in pending:
                self._clear_other_work(name)
            self._work(pending)
            return
        with self._unchanged_if_refused(pending[0]):
            self._begin()
            self._write(
                self._record_file(pending[0], begun=True),
                {"fingerprint": self.fingerprint(pending[0])},
            )
            began = time.monotonic()
            run(self.config)  # its folder takes the place of the old one at the end, whole
            self._finished(pending[0], time.monotonic() - began)

    def _work(self, names: list[str]) -> None:
        given = [(name, self.stages[name].training) for name in names]
        trainings = [
            dataclasses.replace(training, fingerprint=self.fingerprint(name))
            for name, training in given
            if training is not None
        ]
        seconds = stage_runs.train_and_evaluate(
            self.config, trainings, evaluate=len(trainings) < len(names)
        )
        for name, spent in zip(names, seconds, strict=True):
            self._finished(name, spent)

    def check_before(self, name: str, coming: list[str]) -> None:
        """Every stage before this one must be current, unless it is among those that are `coming`."""
        for before in self.stages[name].after:
            if before not in coming and not self.is_current(before):
                state = (
                    "was made by another configuration or other input"
                    if self.record(before)
                    else "has not been made"
                )
                raise UserError(
                    f"{self.folder}: stage {before} {state}; run `ilrec {self.stages[before].command} CONFIG` or `ilrec run CONFIG` first"
                )

    def _finished(self, name: str, seconds: float) -> None:
        self._write(
            self._record_file(name), {"fingerprint": self.fingerprint(name), "seconds": seconds}
        )
        console.print(f"[bold]{name}[/bold]: done in {seconds:.1f} s")

    def stage_seconds(self) -> dict[str, float]:
        return {
            name: record["seconds"]
            for name in self.stages
            if (record := self.record(name)) is not None
        }

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Makes the run's folder and holds it, so that no second command works in it at the same time; the system lets go of it when this process dies."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be used as the run's folder ({error.strerror}); choose another runs_dir or name"
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.folder}: another ilrec command is at work in this folder; wait for its end, or choose another name"
            ) from None
        else:
            yield
        finally:
            os.close(handle)

    def check_resumable(self) -> None:
        """`--resume`: there must be a run in the folder, and every stage it finished or began must be of this configuration."""
        if not self._state_folder().is_dir():
            raise UserError(f"{self.folder}: nothing to resume; leave --resume out to start a run")
        for name in self.stages:
            latest = _read(self._record_file(name, begun=True))
            if latest is not None and latest["fingerprint"] != self.fingerprint(name):
                raise UserError(
                    f"{self.folder}: stage {name} in this run folder is of another configuration or other input; resume with the configuration in "
                    f"{self.folder / 'config.yaml'}, or leave --resume out to run what changed anew"
                )

    def _begin(self) -> None:
        self._state_folder().mkdir(parents=True, exist_ok=True)
        staged = self.folder / f".config.yaml.{os.getpid()}"
        staged.write_text(dump_config(self.config), encoding="utf-8")
        os.replace(staged, self.folder / "config.yaml")

    @contextmanager
    def _unchanged_if_refused(self, name: str) -> Iterator[None]:
        """Where the stage refuses its input, the folder is left as it was: the work of before stays, and a new folder vanishes again."""
        files = {
            path: path.read_bytes() if path.exists() else None
            for path in (self.folder / "config.yaml", self._record_file(name, begun=True))
        }
        try:
            yield
        except UserError:
            for path, content in files.items():
                if content is None:
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(content)
            with suppress(OSError):  # not empty
                self._state_folder().rmdir()
                self.folder.rmdir()
            raise

    def _clear_other_work(self, name: str) -> None:
        """A worker stage's output of another configuration is cleared away; that of an interrupted attempt at the same work stays, to be continued."""
        begun, fingerprint = self._record_file(name, begun=True), self.fingerprint(name)
        before = _read(begun)
        self._record_file(name).unlink(missing_ok=True)
        if before is None or before["fingerprint"] != fingerprint:
            shutil.rmtree(self.stages[name].output(self.config), ignore_errors=True)
        self._write(begun, {"fingerprint": fingerprint})

    def _state_folder(self) -> Path:
        return self.folder / ".stages"

    def _record_file(self, name: str, begun: bool = False) -> Path:
        return self._state_folder() / f"{name}{'.begun' if begun else ''}.json"

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        staged.write_text(json.dumps(value))
        os.replace(staged, path)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def stages(config: Config) -> list[Stage]:
    """The run's stages, each after those it stands on."""

    folders = RunFolders(config.run_dir)
    cf_first = config.items.from_cf  # the codes are built from the CF model's item vectors
    index = Stage(
        "index",
        "index",
        ("cf",) if cf_first else ("prepare",),
        _items_settings,
        stage_runs.index_inputs,
        lambda _: folders.items,
        stage_runs.index,
    )
    cf = Stage("cf", "cf", ("prepare",), _cf_settings, _none, lambda _: folders.cf, stage_runs.cf)
    second, third = (cf, index) if cf_first else (index, cf)
    tables = [
        Stage(
            "prepare",
            "prepare",
            (),
            _data_settings,
            stage_runs.prepare_inputs,
            lambda _: folders.data,
            stage_runs.prepare,
        ),
        second,
        third,
        Stage(
            "rewards",
            third.command,
            ("index", "cf"),
            _rewards_settings,
            _none,
            lambda _: folders.rewards,
            stage_runs.rewards,
        ),
    ]
    trainings = []
    for method in config.train.methods:
        for seed in config.train.seeds:
            name = f"train {method} seed {seed}"
            after = (
                ("index", "rewards")
                if method == "ilrec" and config.objective.crr_lambda > 0
                else ("index",)
            )
            trainings.append(name)
            tables.append(
                _training_stage(name, after, method, seed, folders.training(method, seed))
            )
    evaluation = ("prepare", "cf", *trainings)
    tables.append(
        Stage(
            "evaluate",
            "evaluate",
            evaluation,
            lambda c: _without(c.evaluation, "examples", "batch_size"),
            _none,
            lambda _: folders.evaluation,
        ),
    )
    return tables


def _training_stage(
    name: str, after: tuple[str, ...], method: str, seed: int, folder: Path
) -> Stage:
    settings = partial(_training_settings, method=method, seed=seed)
    return Stage(
        name,
        "train",
        after,
        settings,
        _none,
        lambda _: folder,
        training=TrainingSpec(method, seed, folder, ""),
    )


def execute(config: Config, command: str, resume: bool = False) -> None:
    """Run the stages of one command, or with "run" all of them and the report."""

    run = Run(config)
    if resume:
        run.check_resumable()
    wanted = [stage.name for stage in run.stages.values() if command in ("run", stage.command)]
    for name in wanted:  # input files are looked for before anything runs
        run.stages[name].inputs(config)
    for name in wanted:
        run.check_before(name, wanted)
    with run.alone():
        if any(run.stages[name].run is None and not run.is_current(name) for name in wanted):
            with ray_session(config.launch):
                _execute_all(run, wanted)
        else:
            _execute_all(run, wanted)
        if command in ("run", "evaluate"):
            stage_runs.report(config, run.stage_seconds())


def _execute_all(run: Run, names: list[str]) -> None:
    for of_workers, group in itertools.groupby(
        names, key=lambda name: run.stages[name].run is None
    ):
        if of_workers:
            run.execute(*group)
        else:
            for name in group:
                run.execute(name)


def _none(_: Config) -> list[Path]:
    return []


def _without(section: Any, *names: str) -> dict[str, Any]:
    return {key: value for key, value in config_to_dict(section).items() if key not in names}


def _data_settings(config: Config) -> dict[str, Any]:
    unused = (
        ["min_user_interactions", "min_item_interactions"]
        if config.data.format == "synthetic"
        else ["synthetic"]
    )
    unused += ["max_bad_rows"] if config.data.format == "synthetic" else []
    unused += (
        []
        if config.data.format in ("csv", "parquet")
        else ["user_column", "item_column", "time_column"]
    )
    unused += (
        ["split", "split_ratio", "split_dates"] if config.data.split == "leave_one_out" else []
    )
    return _without(
        config.data, "path", "items_path", "both_directions", *unused
    )  # the files' bytes count, not where they lie


def _items_settings(config: Config) -> dict[str, Any]:
    if config.items.index is not None:
        vectors = (
            {"dim": config.items.embedding_dim, "seed": config.items.seed}
            if config.items.collisions == "resolve"
            else {}
        )  # they price the moves
        return {
            "collisions": config.items.collisions,
            "given": True,
            "form": config.items.form,
        } | vectors
    return _without(config.items, "index", "tokenizer")


def _cf_settings(config: Config) -> dict[str, Any]:
    """What changes the models; how rewards are found is of the stage after it, and how they are served changes none of them."""
    return _without(config.cf, *CF_SERVING) | {"both_directions": config.data.both_directions}


def _rewards_settings(config: Config) -> dict[str, Any]:
    return {"reward_index": config.cf.reward_index, "reward_shards": config.cf.reward_shards}


def _training_settings(config: Config, method: str, seed: int) -> dict[str, Any]:
    """What changes the trained weights, and nothing else."""
    objective = _without(config.objective, "workspace_mib")
    if method == "sft":
        objective = {key: objective[key] for key in ("softmax_scope", "backend")}
    train = _without(config.train, "methods", "seeds", "checkpoint_steps", "keep_checkpoints")
    validation = {"beam": config.evaluation.beam, "exclude_seen": config.evaluation.exclude_seen}
    mesh = {
        "tp": config.launch.tp,
        "workers": config.launch.workers,
        "both_directions": config.data.both_directions,
    }
    return (
        {
            "method": method,
            "seed": seed,
            "backbone": config_to_dict(config.backbone),
            "objective": objective,
            "train": train,
        }
        | validation
        | mesh
    )
