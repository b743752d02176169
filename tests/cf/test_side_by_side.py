"""CF models that the workers of a named cluster train side by side.

The workers are real processes over gloo; only that Ray starts them is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.sasrec import cross_fit
from ilrec_dist.cf.sasrec.cross_fit import train_cf, train_share
from ilrec_dist.common.errors import Stopped, UserError, WorkersFailed
from ilrec_dist.common.files import sha256_file
from ilrec_dist.config.tree import Config
from ilrec_dist.launch import workers
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.job import Job, run_job
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.pipeline.stages import cf
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow
MODELS = ("full", "fold0", "fold1")
NAMED = {"engine": "ray", "ray_address": "10.99.0.1:6379", "workers": 2}


def work(mesh: Mesh, job: str, error: Exception | None) -> None:
    """A worker; the second one may meet an error before it trains anything."""

    def fail(*_: Any) -> None:
        assert error is not None
        raise error

    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1 and error is not None:
            patch.setattr(cross_fit, "fit_sasrec", fail)
        run_job(Job.from_json(job))


def prepared(root: Path, monkeypatch: pytest.MonkeyPatch, **cf_settings: int) -> Config:
    """A run on a named cluster, with what comes before its CF models."""
    monkeypatch.setattr(cf, "ray_session", lambda launch: nullcontext())
    config = tiny_config(root, cf=cf_settings, launch=NAMED)
    for stage in ("prepare", "index"):
        execute(config, stage)
    return config


def run_by(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, lost: bool = False
) -> None:
    def run(launch: LaunchConfig, job: Job) -> None:
        run_distributed(work, launch.workers, 1, job.to_json(), error)
        if lost:
            raise WorkersFailed("lost")

    engines: dict[str, Callable[[LaunchConfig, Job], None]] = {"ray": run}
    monkeypatch.setattr(workers, "ENGINES", engines)


def hashes(folder: Path) -> list[str]:
    names = [*(f"{name}.safetensors" for name in MODELS), "folds.npy"]
    return [sha256_file(folder / name) for name in names]


def test_the_models_are_those_of_one_process_also_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(tmp_path / "together", monkeypatch)
    run = config.run_dir
    # The first worker has trained its two models when the second one is lost.
    run_by(monkeypatch, Stopped(), lost=True)
    with pytest.raises(WorkersFailed):
        execute(config, "cf")
    assert not (run / "cf").exists()
    kept = [run / f".cf.unfinished/cf/{name}.safetensors" for name in ("full", "fold1")]
    before = [path.stat() for path in kept]
    assert not (run / ".cf.unfinished/fold0.json").exists()
    run_by(monkeypatch)
    # This process trains none.
    monkeypatch.setattr(cross_fit, "fit_sasrec", None)
    execute(config, "cf")
    after = [(run / "cf" / path.name).stat() for path in kept]
    assert [status.st_mtime_ns for status in after] == [status.st_mtime_ns for status in before]
    assert not [path.name for path in run.iterdir() if path.name.startswith(".cf")]
    monkeypatch.undo()
    alone = tiny_config(tmp_path / "alone")
    for stage in ("prepare", "index"):
        execute(alone, stage)
    # What workers that failed leave, where the next command has none.
    (alone.run_dir / ".cf-work/.failures").mkdir(parents=True)
    execute(alone, "cf")
    assert hashes(run / "cf") == hashes(alone.run_dir / "cf")
    assert not [path.name for path in alone.run_dir.iterdir() if path.name.startswith(".cf")]


def test_an_error_of_one_worker_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other worker would not come to the end of its first model in the test's time.
    config = prepared(tmp_path, monkeypatch, epochs=100_000, patience=100_000)
    run_by(monkeypatch, UserError("CF model 'fold0' diverged"))
    with pytest.raises(UserError, match="'fold0' diverged"):
        execute(config, "cf")
    assert not [path for path in config.run_dir.iterdir() if "cf" in path.name]


def test_a_process_of_a_killed_command_does_not_write_among_the_models_of_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(tmp_path, monkeypatch)
    artifacts = RunArtifacts(config)
    cf_folder = artifacts.folders.cf
    unfinished = cf_folder.with_name(".cf.unfinished")

    def share(later: CFConfig) -> None:
        """Train a model after another command has begun."""

        def leave() -> None:
            raise WorkersFailed("killed")

        with pytest.raises(WorkersFailed):
            train_cf(later, artifacts.training, None, cf_folder, train_elsewhere=leave)
        train_share(config.cf, artifacts.training, cf_folder, 0, 3)

    with pytest.raises(Stopped):
        share(dataclasses.replace(config.cf, learning_rate=0.5))
    assert not list(unfinished.rglob("full.*"))
    share(config.cf)
    assert len(list(unfinished.rglob("full.*"))) == 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"cf": {"cf_folds": 1}}, False),
        ({"launch": {"workers": 1}}, False),
        ({"launch": {"ray_address": None}}, False),
    ],
)
def test_workers_train_side_by_side_only_on_a_named_cluster(
    tmp_path: Path, settings: dict, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    launch = NAMED | settings.get("launch", {})
    config = tiny_config(tmp_path, **(settings | {"launch": launch}))
    assert cf.is_side_by_side(config) is expected
    local = tiny_config(tmp_path, launch={"workers": 2})
    monkeypatch.setenv("RAY_ADDRESS", "10.99.0.1:6379")
    # Under torchrun the variable says nothing.
    assert not cf.is_side_by_side(local)
