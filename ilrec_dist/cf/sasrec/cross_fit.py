"""The CF stage, `ilrec cf`: a model per fold and one on all users (METHOD.md §5).

The models of the folds give cross-fitted rewards; the report compares them.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.index import index_kind, write_code_order
from ilrec_dist.cf.sasrec.checkpoint import (
    FORMAT_VERSION,
    data_hash,
    models_manifest,
    read_model,
    write_cf_manifest,
)
from ilrec_dist.cf.sasrec.fit import (
    OnEpoch,
    TrainingSequences,
    evenly_spaced,
    fit_sasrec,
    mean_log_probability,
)
from ilrec_dist.cf.sasrec.sharded_table import ItemShard
from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.errors import Stopped, UserError
from ilrec_dist.common.files import (
    clear_leftovers,
    inherit_lock,
    put_in_place,
    read_json_object,
    write_json,
)
from ilrec_dist.common.manifest import MANIFEST
from ilrec_dist.common.run_layout import CODE_ORDER
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue

# Targets that a mean log-probability of the report is taken over, at most.
REPORT_TARGETS = 20_000
# In the folder of unfinished work: what is to be done, and the lock of who does it.
TASK, LOCK = "task.json", ".lock"
# How long the last processes of a killed run may hold the lock. Other ranks wait meanwhile, twice
# as long by default.
PATIENCE_SECONDS = 300.0


class _Model(NamedTuple):
    """One of the models to train."""

    name: str
    # bool [U]: the users that it is trained on; None: all.
    users: np.ndarray | None
    seed: int


def user_folds(user_ids: Iterable[str], folds: int) -> np.ndarray:
    """The fold of each user, int64 [U].

    It is the first 8 bytes of BLAKE2b(user id in UTF-8), big-endian, modulo `folds`: it
    depends on the id alone, so no user's data, nor the presence of other users, moves
    anyone to another fold.
    """
    return np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(user.encode(), digest_size=8).digest(), "big") % folds
            for user in user_ids
        ),
        np.int64,
    )


def train_cf(
    config: CFConfig,
    dataset: InteractionDataset,
    catalogue: Catalogue | None,
    out: str | Path,
    on_epoch: OnEpoch | None = None,
    device: str = "cpu",
    shard: ItemShard | None = None,
    train_elsewhere: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train all CF models and write their folder, whole or not at all.

    Users are hashed into `cf_folds` by `user_folds`. Fold k's users are scored by a
    model to which they do not exist: its item counts, batches, random numbers and early
    stopping come from the other users alone. With cf_folds = 1 there are no others: the
    one model has seen every target. With a catalogue the folder also gets what
    `write_code_order` makes for it, which rewards need; that may be called later as
    well.

    With `shard` the item table and its optimizer state are sharded over the processes
    of the default group, each of which calls this with its own shard and sees the same
    folder, and the models are those of one process but for rounding. Models that an
    interrupted call finished with the same settings and data are taken over.
    Deterministic for a seed, a number of torch threads and of shards. Returns the
    report, which is also written as report.json.

    `train_elsewhere` is called first where models are left to train, and may have other
    processes train them by `train_share` meanwhile.

    Raises UserError when a fold leaves too few users to train on, and when a model
    diverges.
    """
    started = time.perf_counter()
    out = Path(out)
    # What cannot be served is refused before it is trained.
    index_kind(config, dataset.num_items)
    shard = shard or ItemShard(dataset.num_items)
    sequences = _training_sequences(dataset)
    folds = user_folds(dataset.user_ids, config.cf_folds)
    with _unfinished_folder(out, config, dataset, folds, shard) as unfinished:
        work = unfinished / out.name
        models = list(_models(config, folds))
        reports_there = [(unfinished / f"{model.name}.json").exists() for model in models]
        if train_elsewhere is not None and not all(reports_there):
            train_elsewhere()
        reports = {
            model.name: _trained(model, config, shard, sequences, out, on_epoch, device)
            for model in models
        }
        if config.cf_folds == 1 and shard.is_rank0:
            shutil.copyfile(work / "full.safetensors", work / "fold0.safetensors")
        shard.barrier()
        report = {
            "folds": config.cf_folds,
            "models": reports,
            "log_p": _log_probabilities(config, shard, sequences, folds, work, device),
        }
        report["seconds"] = time.perf_counter() - started
        # Wait until no process reads the models any more.
        shard.barrier()
        if shard.is_rank0:
            _commit(config, dataset, catalogue, folds, report, work, out)
            shutil.rmtree(unfinished, ignore_errors=True)
    return report


def train_share(
    config: CFConfig,
    dataset: InteractionDataset,
    out: str | Path,
    rank: int,
    processes: int,
    on_epoch: OnEpoch | None = None,
    device: str = "cpu",
) -> None:
    """Train every `processes`-th model from `rank` on, each by this process alone.

    Another process is in `train_cf` with the same settings, data and folder, which both
    see, and takes the models over. Raises UserError as `train_cf` does, and Stopped
    before anything is written where the models that are asked for are others: a later
    command may have begun, whose folder this process, left by a killed one, must not
    write to.
    """
    sequences, shard = _training_sequences(dataset), ItemShard(dataset.num_items)
    folds = user_folds(dataset.user_ids, config.cf_folds)
    task, asked = _task(config, dataset, folds, shard), _unfinished(Path(out)) / TASK

    def go_on(event: dict[str, Any]) -> None:
        if _read_task(asked) != task:
            raise Stopped
        if on_epoch is not None:
            on_epoch(event)

    for model in list(_models(config, folds))[rank::processes]:
        _trained(model, config, shard, sequences, Path(out), go_on, device)


def _training_sequences(dataset: InteractionDataset) -> TrainingSequences:
    return TrainingSequences(
        dataset.items,
        dataset.offsets[:-1],
        dataset.train_lengths(),
        dataset.target_positions("validation"),
    )


def _trained(
    model: _Model,
    config: CFConfig,
    shard: ItemShard,
    sequences: TrainingSequences,
    out: Path,
    on_epoch: OnEpoch | None,
    device: str,
) -> dict[str, Any]:
    """Train a model into the folder of unfinished work, unless it is there; its
    report.
    """
    unfinished = _unfinished(out)
    report_path = unfinished / f"{model.name}.json"
    report = _finished_report(report_path, model.name, config, shard, on_epoch)
    if report is None:
        path = unfinished / out.name / f"{model.name}.safetensors"
        trained_on = sequences if model.users is None else sequences.select(model.users)
        report = fit_sasrec(config, shard, trained_on, path, model.seed, on_epoch, device)
        if shard.is_rank0:
            write_json(report_path, report)
    return report


def _models(config: CFConfig, folds: np.ndarray) -> Iterator[_Model]:
    """The models to train: the full one, and one for each of several folds."""
    yield _Model("full", None, config.seed)
    if config.cf_folds > 1:
        for fold in range(config.cf_folds):
            yield _Model(f"fold{fold}", folds != fold, config.seed * 1_000_003 + fold + 1)


def _finished_report(
    path: Path, name: str, config: CFConfig, shard: ItemShard, on_epoch: OnEpoch | None
) -> dict[str, Any] | None:
    """The report of a model that an interrupted call finished, None where it has none.

    A model's report is written after the model.
    """
    report: dict[str, Any] | None = None
    if shard.is_rank0 and path.exists():
        report = read_json_object(path)
    report = shard.broadcast_object(report)
    if report is not None and on_epoch is not None:
        figures = {"seconds": report["seconds"], **report["curve"][-1]}
        on_epoch({"model": name, "epochs": config.epochs, **figures})
    return report


def _commit(
    config: CFConfig,
    dataset: InteractionDataset,
    catalogue: Catalogue | None,
    folds: np.ndarray,
    report: dict[str, Any],
    work: Path,
    out: Path,
) -> None:
    """Complete the folder `work`, which holds the models, and move it to `out`."""
    # Of an attempt that was interrupted here.
    shutil.rmtree(work / CODE_ORDER, ignore_errors=True)
    (work / MANIFEST).unlink(missing_ok=True)
    np.save(work / "folds.npy", folds.astype(np.int32))
    write_json(work / "report.json", report)
    write_cf_manifest(work, models_manifest(config, dataset))
    if catalogue is not None:
        write_code_order(config, work, catalogue)
    put_in_place(work, out)


@contextmanager
def _unfinished_folder(
    out: Path, config: CFConfig, dataset: InteractionDataset, folds: np.ndarray, shard: ItemShard
) -> Iterator[Path]:
    """The folder that gathers models and their reports until all are there.

    It stays when the work is interrupted, for the next call with the same task; where
    the input is refused it vanishes.
    """
    unfinished = _unfinished(out)
    lock = None
    if shard.is_rank0:
        lock = _lock_folder(unfinished)
        clear_leftovers(out)
        task = _task(config, dataset, folds, shard)
        if _read_task(unfinished / TASK) != task:
            for path in unfinished.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
            (unfinished / out.name).mkdir()
            write_json(unfinished / TASK, task)
    shard.barrier()
    try:
        yield unfinished
    except UserError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _unfinished(out: Path) -> Path:
    return out.with_name(f".{out.name}.unfinished")


def _task(
    config: CFConfig, dataset: InteractionDataset, folds: np.ndarray, shard: ItemShard
) -> dict[str, Any]:
    """Everything that the models depend on."""
    return {
        "version": FORMAT_VERSION,
        "settings": stage_settings(config, "cf"),
        "data": data_hash(dataset),
        "folds": hashlib.sha256(folds.tobytes()).hexdigest(),
        "items": dataset.num_items,
        "shards": shard.world_size,
    }


def _read_task(path: Path) -> dict[str, Any] | None:
    """The task of unfinished work, None where there is none or the file is damaged."""
    try:
        return read_json_object(path)
    except UserError:
        return None


def _lock_folder(folder: Path) -> int:
    """Make the folder and hold its lock, for as long as the file descriptor is open.

    Waits for the last processes of a killed run, at most PATIENCE_SECONDS, and makes
    the folder anew where they have removed it.
    """
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = inherit_lock(path, PATIENCE_SECONDS)
        except FileNotFoundError:
            continue
        if path.exists() and os.path.samestat(os.fstat(lock), os.stat(path)):
            return lock
        os.close(lock)


def _log_probabilities(
    config: CFConfig,
    shard: ItemShard,
    sequences: TrainingSequences,
    folds: np.ndarray,
    work: Path,
    device: str,
) -> dict[str, Any]:
    """Mean log P_CF(y) on in-fold targets, cross-fitted ones, and validation targets.

    In-fold targets are those that a fold's model was trained on, cross-fitted ones
    those that it scores; on validation targets it is the full model's. The first
    exceeds the third by what a model remembers of its own targets; the second should
    not.
    """
    in_fold, cross_fitted = [], []
    for fold in range(config.cf_folds):
        model = read_model(work / f"fold{fold}.safetensors", config, shard).to(device)
        trained_on = sequences.select(folds != fold if config.cf_folds > 1 else folds == fold)
        targets = trained_on.training_targets(REPORT_TARGETS)
        in_fold.append(mean_log_probability(model, trained_on, *targets))
        scored = sequences.select(folds == fold)
        targets = scored.training_targets(REPORT_TARGETS)
        cross_fitted.append(mean_log_probability(model, scored, *targets))
    rows = np.flatnonzero(sequences.validation >= 1)
    rows = rows[evenly_spaced(len(rows), REPORT_TARGETS)]
    full = read_model(work / "full.safetensors", config, shard).to(device)
    report = {
        "in_fold": _pool(in_fold),
        "cross_fitted": _pool(cross_fitted),
        "validation": mean_log_probability(full, sequences, rows, sequences.validation[rows]),
    }
    for name, entry in report.items():
        if not math.isfinite(entry["mean_log_p"]):
            raise UserError(
                f"CF models: the mean log P_CF of {name} targets is {entry['mean_log_p']}, so a "
                "model has diverged; lower cf.learning_rate and run `ilrec cf` again"
            )
    return report


def _pool(parts: list[dict[str, float]]) -> dict[str, float]:
    """The mean over all targets of several means."""
    targets = sum(part["targets"] for part in parts)
    known = sum(part["targets"] * part["known_share"] for part in parts)
    log_p = sum(part["mean_log_p"] * part["targets"] * part["known_share"] for part in parts)
    return {
        "mean_log_p": log_p / max(1.0, known),
        "targets": targets,
        "known_share": known / max(1, targets),
    }
