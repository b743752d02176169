"""The CF stage: folds, cross-fitting, determinism, the report and the
folder's hashes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.cf.sasrec import cross_fit as train
from ilrec_dist.cf.sasrec.checkpoint import load_cf, load_folds
from ilrec_dist.cf.sasrec.cross_fit import train_cf, user_folds
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import sha256_file
from ilrec_dist.evaluation.baselines.sasrec import sasrec_scores
from tests.support.cf_world import CONFIG, World, copy_models, training_targets, with_sequence


def changed(world: World, user: int) -> np.ndarray:
    """Another sequence of the same length for the user, of random items."""
    return (
        np.random.default_rng(5)
        .permutation(world.dataset.num_items)[: len(world.dataset.sequence(user))]
        .astype(np.int32)
    )


def test_folds_depend_on_the_id_alone() -> None:
    ids = [f"user-{i}" for i in range(2000)]
    folds = user_folds(ids, 4)
    assert np.array_equal(folds[5:9], user_folds(ids[5:9], 4))
    assert np.bincount(folds, minlength=4).min() > 400
    assert user_folds(["A2IBPI20UZIR0U"], 2).tolist() == user_folds(["A2IBPI20UZIR0U"], 2).tolist()


def test_one_user_leaves_no_trace_in_the_model_that_scores_them(
    world: World, tmp_path: Path
) -> None:
    user = 3
    altered = with_sequence(world.dataset, user, changed(world, user))
    train_cf(CONFIG, altered, world.catalogue, tmp_path / "cf")
    fold = load_folds(world.cf)[user]
    same = [
        sha256_file(world.cf / f"fold{k}.safetensors")
        == sha256_file(tmp_path / "cf" / f"fold{k}.safetensors")
        for k in range(2)
    ]
    assert same[fold] and not same[1 - fold]


def test_without_cross_fitting_the_user_does_leave_a_trace(world: World, tmp_path: Path) -> None:
    """The check above is not empty: with cf_folds = 1 it fails."""
    user = 3
    for name, dataset in (
        ("before", world.dataset),
        ("after", with_sequence(world.dataset, user, changed(world, user))),
    ):
        train_cf(replace(CONFIG, cf_folds=1), dataset, None, tmp_path / name)
    assert sha256_file(tmp_path / "before" / "fold0.safetensors") != sha256_file(
        tmp_path / "after" / "fold0.safetensors"
    )


def test_training_again_gives_the_same_bytes_and_calls_progress(
    world: World, tmp_path: Path
) -> None:
    events: list[dict] = []
    train_cf(CONFIG, world.dataset, world.catalogue, tmp_path / "cf", on_epoch=events.append)
    for name in ("full", "fold0", "fold1"):
        assert sha256_file(world.cf / f"{name}.safetensors") == sha256_file(
            tmp_path / "cf" / f"{name}.safetensors"
        )
    assert [event["model"] for event in events] == ["full"] * 2 + ["fold0"] * 2 + ["fold1"] * 2
    assert set(events[0]) == {"model", "epoch", "epochs", "loss", "ndcg@10", "seconds"}
    assert events[1]["loss"] < events[0]["loss"]


class Killed(BaseException):
    """As a signal would, in the middle."""


def test_a_killed_stage_goes_on_with_the_models_it_had_finished(
    world: World, tmp_path: Path
) -> None:
    def kill(event: dict) -> None:
        if (event["model"], event["epoch"]) == ("fold0", 1):
            raise Killed

    # What was left of other settings is not gone on with.
    for config in (
        replace(CONFIG, seed=1),
        CONFIG,
    ):
        with pytest.raises(Killed):
            train_cf(config, world.dataset, None, tmp_path / "cf", on_epoch=kill)
    events: list[dict] = []
    report = train_cf(
        CONFIG, world.dataset, world.catalogue, tmp_path / "cf", on_epoch=events.append
    )
    assert [(event["model"], event["epoch"]) for event in events] == [
        ("full", 2),
        ("fold0", 1),
        ("fold0", 2),
        ("fold1", 1),
        ("fold1", 2),
    ]
    assert (
        report["models"]["full"]["curve"] == world.report["models"]["full"]["curve"]
        and report["log_p"] == world.report["log_p"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["cf"]
    files = {path.relative_to(world.cf) for path in world.cf.rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(tmp_path / "cf") for path in (tmp_path / "cf").rglob("*") if path.is_file()
    }
    for name in ("full", "fold0", "fold1"):
        assert sha256_file(world.cf / f"{name}.safetensors") == sha256_file(
            tmp_path / "cf" / f"{name}.safetensors"
        )


def test_a_stage_killed_at_its_very_end_trains_nothing_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise Killed

    for what in ("put_in_place", "write_code_order", "write_cf_manifest"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train, what, kill)
            train_cf(CONFIG, world.dataset, world.catalogue, tmp_path / "cf")
    events: list[dict] = []
    train_cf(CONFIG, world.dataset, world.catalogue, tmp_path / "cf", on_epoch=events.append)
    assert [(event["model"], event["epoch"]) for event in events] == [
        ("full", 2),
        ("fold0", 2),
        ("fold1", 2),
    ]
    files, expected = (
        json.loads((cf / "manifest.json").read_text())["files"]
        for cf in (tmp_path / "cf", world.cf)
    )
    # The report holds seconds.
    assert files | {"report.json": None} == expected | {"report.json": None}


@pytest.mark.parametrize("change", ["users", "settings", "format", "half a note"])
def test_unfinished_work_of_another_task_is_not_gone_on_with(
    world: World, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(event: dict) -> None:
        if event["model"] == "fold1":
            raise Killed

    with pytest.raises(Killed):
        train_cf(CONFIG, world.dataset, None, tmp_path / "cf", on_epoch=kill)
    # Which changes no model.
    config, dataset = replace(CONFIG, reward_retries=1), world.dataset
    # Other folds: a model of before has seen users that it would have to score.
    if change == "users":
        dataset = replace(dataset, user_ids=[f"{user}x" for user in dataset.user_ids])
    elif change == "settings":
        config = replace(config, learning_rate=2e-3)
    elif change == "format":
        monkeypatch.setattr(train, "FORMAT_VERSION", train.FORMAT_VERSION + 1)
    else:
        (tmp_path / ".cf.unfinished/task.json").write_text("{")
    events: list[dict] = []
    train_cf(config, dataset, None, tmp_path / "cf", on_epoch=events.append)
    assert len(events) == 6 and [path.name for path in tmp_path.iterdir()] == ["cf"]


def test_report_gives_the_three_log_probabilities(world: World) -> None:
    log_p = world.report["log_p"]
    assert set(log_p) == {"in_fold", "cross_fitted", "validation"}
    users, _ = training_targets(world.dataset)
    assert log_p["cross_fitted"]["targets"] == len(users)
    assert all(
        -np.log(world.dataset.num_items) - 1 < part["mean_log_p"] < 0 for part in log_p.values()
    )


def test_sasrec_scores_read_what_stands_before_the_target(world: World) -> None:
    users = np.array([4, 0, 7])
    model = load_cf(world.cf)
    scores = sasrec_scores(model, world.dataset, users, "test")
    assert scores.shape == (3, world.dataset.num_items) and scores.dtype == np.float32
    sequence = world.dataset.sequence(0).copy()
    sequence[-1] = (sequence[-1] + 1) % world.dataset.num_items
    altered = with_sequence(world.dataset, 0, sequence)
    assert np.array_equal(sasrec_scores(model, altered, users, "test"), scores)
    assert not np.array_equal(sasrec_scores(model, world.dataset, users, "validation"), scores)


def test_strangers_and_damaged_manifests_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a CF folder"):
        load_cf(tmp_path)
    cf = copy_models(world.cf, tmp_path / "cf")
    manifest = json.loads((cf / "manifest.json").read_text())
    for damage, message in (
        ({"config": []}, "manifest.json: damaged .no usable 'config'"),
        ({"config": manifest["config"] | {"width": 3}}, "manifest.json: damaged"),
        ({"files": None}, "manifest.json: damaged .no usable 'files'"),
        ({"version": 2}, "manifest.json: version 2, expected 1"),
    ):
        (cf / "manifest.json").write_text(json.dumps(manifest | damage))
        with pytest.raises(UserError, match=message):
            load_cf(cf)


def test_too_many_folds_for_the_users_is_one_clear_error(world: World, tmp_path: Path) -> None:
    one = replace(
        world.dataset,
        offsets=world.dataset.offsets[:2],
        user_ids=list(world.dataset.user_ids)[:1],
    )
    with pytest.raises(UserError, match="cf_folds"):
        train_cf(CONFIG, one, None, tmp_path / "cf")
    assert not list(tmp_path.iterdir())
