"""The evaluation of trained models saves parts of users, and goes on from them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.files import file_lock, sha256_file, write_json
from ilrec_dist.common.manifest import MANIFEST
from ilrec_dist.common.run_layout import BEST, RESULT, WEIGHTS_SHA256
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.config.tree import Config
from ilrec_dist.evaluation.fusion import FusionScores
from ilrec_dist.evaluation.fusion_ranking import Fusions
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.pipeline import evaluate_trained, rankings
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import open_run
from ilrec_dist.pipeline.worker_tasks import train_and_evaluate
from ilrec_dist.reporting.counter import Count
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.tiny_run import tiny_config, train_here

pytestmark = pytest.mark.slow
NUM_USERS, PART_USERS = 150, 60
SIZES = [60, 60, 30]
# Which are ranked together.
FUSED = ("sft+cf", "sft+cf+transitions")
NAMES = ("predictions.parquet", "predictions-seen-kept.parquet")
# Rankings of a part, with and without seen items at once: by the model and by the fusions.
OF_A_PART = 1 + 1


@pytest.fixture(scope="module")
def config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a run with a trained model that was not evaluated."""
    root = tmp_path_factory.mktemp("parts")
    shutil.copytree(tiny / "tiny", root / "tiny")
    config = tiny_config(
        root,
        train={"methods": ["sft"], "epochs": 1},
        backbone={"num_layers": 1},
        evaluation={"fusion": True},
        launch={"workers": 2},
    )
    folder = RunArtifacts(config).folders.training("sft", 0)
    run_distributed(train_here, 2, 1, config_to_dict(config), "sft", str(folder))
    return config


def fingerprints_before(tree: dict) -> dict[str, str]:
    return open_run(config_from_dict(tree)).fingerprints_before("evaluate")


def evaluate(
    mesh: Mesh, tree: dict, part_users: int, stop_at: int | None = None, die: bool = False
) -> list[int]:
    """As a worker does; the sizes of the parts of test users that were ranked.

    It stops when it is to rank part number `stop_at`; with `die`, rank 0 kills itself.
    """
    sizes: list[int] = []
    evaluate_treatments, fused_scores = evaluate_trained.evaluate_treatments, Fusions.scores

    def count(users: np.ndarray) -> None:
        if len(sizes) == stop_at and die and mesh.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        elif len(sizes) == stop_at and not die:
            raise InterruptedError
        sizes.append(len(users))

    def by_model(*args: Any, users: np.ndarray, **rest: Any) -> list[Predictions]:
        count(users)
        return evaluate_treatments(*args, users=users, **rest)

    def fused(own: Fusions, users: np.ndarray, split: str, *rest: Any) -> Iterator[FusionScores]:
        if split == "test":
            count(users)
        return fused_scores(own, users, split, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankings, "PART_USERS", part_users)
        patch.setattr(evaluate_trained, "evaluate_treatments", by_model)
        patch.setattr(Fusions, "scores", fused)
        with suppress(InterruptedError):
            train_and_evaluate(tree, [], fingerprints_before(tree))
    return sizes


def predictions(config: Config) -> dict[str, Any]:
    folder = RunArtifacts(config).folders.evaluation
    return {
        path.relative_to(folder).as_posix(): pq.read_table(path)
        for path in sorted(folder.rglob("*.parquet"))
    }


def lists(*tables: Any) -> list[list[list[int]]]:
    return [table.column("items").to_pylist() for table in tables]


def test_a_killed_evaluation_goes_on_with_the_parts_that_it_saved(config: Config) -> None:
    folder, tree = RunArtifacts(config).folders.evaluation, config_to_dict(config)
    # Undisturbed, in parts and in one.
    sizes = run_distributed(evaluate, 2, 1, tree, PART_USERS)
    assert sizes == [SIZES * OF_A_PART] * 2
    in_parts = predictions(config)
    assert {f"sft-seed0/{name}" for name in NAMES} <= in_parts.keys()
    assert {f"{fused}-seed0/{name}" for fused in FUSED for name in NAMES} <= in_parts.keys()
    shutil.rmtree(folder)
    plain = tree | {"evaluation": tree["evaluation"] | {"fusion": False}}
    assert run_distributed(evaluate, 2, 1, plain, NUM_USERS) == [[NUM_USERS]] * 2
    for name in (f"sft-seed0/{name}" for name in NAMES):
        whole = predictions(config)[name]
        assert in_parts[name].column("user") == whole.column("user"), name
        # Batches are others, and so are last bits.
        same = [a == b for a, b in zip(*lists(in_parts[name], whole), strict=True)]
        assert np.mean(same) > 0.9, name

    # Killed in the model's third part, then stopped in the third part of the fusions'.
    shutil.rmtree(folder)
    # The other rank may be the first to say that it is gone.
    with pytest.raises(RuntimeError, match="died|by peer"):
        run_distributed(evaluate, 2, 1, tree, PART_USERS, 2, True)
    saved = [
        folder / f"sft-seed0/.{name}.parts/{part:06d}.parquet" for name in NAMES for part in (0, 1)
    ]
    assert sorted(folder.rglob("*.parquet")) == sorted(saved)
    half = folder / f"sft-seed0/.{NAMES[0]}.writing-1"
    half.touch()
    run_distributed(evaluate, 2, 1, tree, PART_USERS, len(SIZES) - 2 + 2)
    assert not half.exists()
    weights = [
        folder / f"{fused}-seed0" / name.replace(".parquet", ".fusion.json")
        for fused in FUSED
        for name in NAMES
    ]
    chosen = [file.stat().st_mtime_ns for file in weights]
    for file in weights:
        assert sorted(file.parent.rglob("*.parquet")) == sorted(
            file.with_name(f".{name}.parts") / f"{part:06d}.parquet"
            for name in NAMES
            for part in (0, 1)
        )
    # As if it were stopped when it had saved the second part of some of them.
    (weights[1].with_name(f".{NAMES[0]}.parts") / "000001.parquet").unlink()
    sizes = run_distributed(evaluate, 2, 1, tree, PART_USERS)
    assert sizes == [SIZES[1:] + SIZES * (OF_A_PART - 2)] * 2
    assert predictions(config) == in_parts
    assert [file.stat().st_mtime_ns for file in weights] == chosen
    assert not list(folder.rglob(".*parts"))


def counted(mesh: Mesh, tree: dict) -> list[Count]:
    """What a worker that evaluates writes for the driver to show."""
    counts: list[Count] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankings, "PART_USERS", PART_USERS)
        patch.setattr(rankings, "write_counter", lambda _, count: counts.append(count))
        train_and_evaluate(tree, [], fingerprints_before(tree))
    return counts


def test_all_that_takes_long_is_counted_to_its_end(config: Config) -> None:
    shutil.rmtree(RunArtifacts(config).folders.evaluation, ignore_errors=True)
    counts, others = run_distributed(counted, 2, 1, config_to_dict(config))
    assert others == []
    by_title = {
        title: list(found) for title, found in groupby(counts, key=lambda count: count.title)
    }
    # The baselines rank so few users in the other process.
    assert list(by_title) == ["evaluate", "fusions"]
    for title, found in by_title.items():
        done = [count.done for count in found]
        assert done == sorted(done) and done[0] == 0 and done[-1] == found[0].total, title
    validation, test = config.train.validation_users, NUM_USERS
    found = by_title["fusions"]
    assert found[0].total == validation + test
    steps = [(count.note, count.done) for count in found]
    for note, first, last in (
        ("sft, weights", 0, validation),
        ("sft", validation, validation + test),
    ):
        own = [done for name, done in steps if name == note and done <= validation + test]
        assert own[0] == first and own[-1] >= last and len(set(own)) > 2, note


def flip_a_byte(path: Path) -> None:
    """In its first half."""
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    path.write_bytes(content)


def test_a_damaged_part_is_ranked_again(config: Config) -> None:
    folder, tree = RunArtifacts(config).folders.evaluation, config_to_dict(config)
    tree["evaluation"]["fusion"] = False
    shutil.rmtree(folder, ignore_errors=True)
    run_distributed(evaluate, 2, 1, tree, PART_USERS, 2)
    before = predictions(config)
    flip_a_byte(folder / f"sft-seed0/.{NAMES[1]}.parts/000000.parquet")
    assert run_distributed(evaluate, 2, 1, tree, PART_USERS) == [[SIZES[0], SIZES[2]]] * 2
    found = predictions(config)
    for name in NAMES:
        joined = found[f"sft-seed0/{name}"].column("items").to_pylist()
        parts = [before[f"sft-seed0/.{name}.parts/{part:06d}.parquet"] for part in (0, 1)]
        assert joined[: sum(SIZES[:2])] == lists(*parts)[0] + lists(*parts)[1]
    # All predictions of one treatment.
    flip_a_byte(folder / f"sft-seed0/{NAMES[0]}")
    assert run_distributed(evaluate, 2, 1, tree, PART_USERS) == [SIZES] * 2
    assert predictions(config) == found


def test_processes_of_a_killed_command_and_a_later_one_do_not_rank_together(
    config: Config,
) -> None:
    folders, tree = RunArtifacts(config).folders, config_to_dict(config)
    tree["evaluation"]["fusion"] = False
    tree["launch"]["timeout_seconds"] = 8.0
    shutil.rmtree(folders.evaluation, ignore_errors=True)
    with file_lock(folders.trainings / ".lock") as handle:
        os.write(handle, b"12 on there")
        line = f"{folders.trainings}: process 12 on there, of an earlier command or attempt, still"
        with pytest.raises(RuntimeError, match=line):
            run_distributed(evaluate, 2, 1, tree, PART_USERS)
        assert not folders.evaluation.exists()
    assert run_distributed(evaluate, 2, 1, tree, PART_USERS) == [SIZES] * 2


def test_parts_of_another_model_are_never_joined(config: Config) -> None:
    artifacts, tree = RunArtifacts(config), config_to_dict(config)
    tree["evaluation"]["fusion"] = False
    shutil.rmtree(artifacts.folders.evaluation, ignore_errors=True)
    run_distributed(evaluate, 2, 1, tree, PART_USERS, 1)
    # A part of each treatment.
    assert len(predictions(config)) == 2
    training = artifacts.folders.training("sft", 0)
    # As if it were trained again: other weights have another manifest.
    manifest = training / BEST / MANIFEST
    manifest.write_text(manifest.read_text() + "\n")
    result = json.loads((training / RESULT).read_text())
    result[WEIGHTS_SHA256][BEST] = sha256_file(manifest)
    write_json(training / RESULT, result)
    sizes = run_distributed(evaluate, 2, 1, tree, PART_USERS)
    assert sizes == [SIZES] * 2
