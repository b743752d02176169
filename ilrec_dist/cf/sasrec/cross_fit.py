"""The CF stage: one model per fold for cross-fitted rewards and one on all users, with their report (METHOD.md §5); `ilrec cf` runs it."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.index import index_kind, write_code_order
from ilrec_dist.cf.sasrec.checkpoint import (
    FORMAT_VERSION,
    data_hash,
    models_manifest,
    read_model,
    write_manifest,
)
from ilrec_dist.cf.sasrec.fit import (
    Histories,
    Progress,
    evenly_spaced,
    mean_log_probability,
    train_model,
)
from ilrec_dist.cf.sasrec.sharded_table import Split
from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import clear_leftovers, put_in_place, read_json_object, write_json
from ilrec_dist.common.run_layout import CODE_ORDER
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue

REPORTED = 20_000  # targets that a mean log-probability of the report is taken over, at most
TASK, LOCK = (
    "task.json",
    ".lock",
)  # in the folder of unfinished work: what is to be done, and who is at it


def user_folds(user_ids: Iterable[str], folds: int) -> np.ndarray:
    """The fold of each user, int64 [U]: the first 8 bytes of BLAKE2b(user id in UTF-8), big-endian, modulo `folds`.

    It depends on the id alone, so no user's data, nor the presence of other users, moves anyone to another fold.
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
    progress: Progress | None = None,
    device: str = "cpu",
    split: Split | None = None,
) -> dict[str, Any]:
    """Train all CF models and write their folder, whole or not at all; returns the report that is also written as report.json.

    Users are hashed into `cf_folds` by `user_folds`. Fold k's users are scored by a model to which they do not exist: its item counts, batches,
    random numbers and early stopping come from the other users alone. With cf_folds = 1 there are no others: the one model has seen every target.
    With a catalogue also what `write_code_order` makes for it, which rewards need; it may be called later as well. `progress` is called after each
    epoch with model, epoch, epochs, loss, ndcg@10 (validation) and seconds. With `split` the item table and its optimizer are split over the processes of
    the default group, each of which calls this with its own part and sees the same folder, and the models are those of one process but for rounding.
    Models that an interrupted call finished with the same settings and data are taken from it. Deterministic for a seed, a number of torch threads and
    of parts. Raises UserError when a fold leaves too few users to train on.
    """
    started = time.perf_counter()
    out = Path(out)
    index_kind(config, dataset.num_items)  # what cannot be served is refused before it is trained
    split = split or Split(dataset.num_items)
    histories = Histories(
        dataset.items,
        dataset.offsets[:-1],
        dataset.train_lengths(),
        dataset.target_positions("validation"),
    )
    folds = user_folds(dataset.user_ids, config.cf_folds)
    with _unfinished(out, config, dataset, folds, split) as unfinished:
        work = unfinished / out.name
        trainings = {"full": (histories, config.seed)}
        if config.cf_folds > 1:
            trainings |= {
                f"fold{fold}": (
                    _users(histories, folds != fold),
                    config.seed * 1_000_003 + fold + 1,
                )
                for fold in range(config.cf_folds)
            }
        reports = {}
        for name, (users, seed) in trainings.items():
            reports[name] = _trained(
                config,
                split,
                users,
                work / f"{name}.safetensors",
                seed,
                unfinished / f"{name}.json",
                progress,
                device,
            )
        if config.cf_folds == 1 and split.part == 0:
            shutil.copyfile(work / "full.safetensors", work / "fold0.safetensors")
        split.barrier()
        report = {
            "folds": config.cf_folds,
            "models": reports,
            "log_p": _log_probabilities(config, split, histories, folds, work, device),
        }
        report["seconds"] = time.perf_counter() - started
        split.barrier()  # none reads them any more
        if split.part == 0:
            for stale in ("manifest.json", CODE_ORDER):  # of an attempt that was interrupted here
                shutil.rmtree(work / stale) if (work / stale).is_dir() else (work / stale).unlink(
                    missing_ok=True
                )
            np.save(work / "folds.npy", folds.astype(np.int32))
            write_json(work / "report.json", report)
            write_manifest(work, models_manifest(config, dataset))
            if catalogue is not None:
                write_code_order(config, work, catalogue)
            put_in_place(work, out)
            shutil.rmtree(unfinished, ignore_errors=True)
    return report


@contextmanager
def _unfinished(
    out: Path, config: CFConfig, dataset: InteractionDataset, folds: np.ndarray, split: Split
) -> Iterator[Path]:
    """The folder in which models, and notes of what is done, gather until all are there. It stays when the work is interrupted, for the next call with
    the same task; where the input is refused it vanishes."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    lock = None
    if split.part == 0:
        lock = _only_writer(unfinished)
        clear_leftovers(out)
        settings = stage_settings(config, "cf")
        task = {
            "version": FORMAT_VERSION,
            "settings": settings,
            "data": data_hash(dataset),
            "folds": hashlib.sha256(folds.tobytes()).hexdigest(),
        }
        task |= {"items": dataset.num_items, "parts": split.parts}
        if _noted(unfinished / TASK) != task:
            for path in unfinished.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
            (unfinished / out.name).mkdir()
            write_json(unfinished / TASK, task)
    split.barrier()
    try:
        yield unfinished
    except UserError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.close()


def _noted(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path)
    except UserError:  # none, or damaged
        return None


def _only_writer(folder: Path) -> IO[str]:
    """Make the folder and hold its lock; waits for the last processes of a killed run, and makes it anew where they have removed it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / LOCK).exists() and os.path.samestat(
            os.fstat(lock.fileno()), os.stat(folder / LOCK)
        ):
            return lock
        lock.close()


def _trained(
    config: CFConfig,
    split: Split,
    histories: Histories,
    path: Path,
    seed: int,
    note: Path,
    progress: Progress | None,
    device: str,
) -> dict[str, Any]:
    """The report of the model at `path`, which is trained unless it is there: its report, at `note`, comes last."""
    report: dict[str, Any] | None = split.told(
        read_json_object(note) if split.part == 0 and note.exists() else None
    )
    if report is not None:
        if progress is not None:
            progress(
                {
                    "model": path.stem,
                    "epochs": config.epochs,
                    "seconds": report["seconds"],
                    **report["curve"][-1],
                }
            )
        return report
    report = train_model(config, split, histories, path, seed, progress, device)
    if split.part == 0:
        write_json(note, report)
    return report


def _users(histories: Histories, chosen: np.ndarray) -> Histories:
    parts = {
        name: getattr(histories, name)[chosen]
        for name in ("starts", "training_lengths", "validation")
    }
    return dataclasses.replace(histories, **parts)


def _log_probabilities(
    config: CFConfig, split: Split, histories: Histories, folds: np.ndarray, work: Path, device: str
) -> dict[str, Any]:
    """Mean log P_CF(y): on targets a fold model was trained on, on those it scores, and of the full model on validation targets.

    The first exceeds the third by what a model remembers of its own targets; the second should not.
    """
    crossed = config.cf_folds > 1
    in_fold, cross_fitted = [], []
    for fold in range(config.cf_folds):
        model = read_model(work / f"fold{fold}.safetensors", config, split).to(device)
        own = _users(histories, folds != fold if crossed else folds == fold)
        in_fold.append(mean_log_probability(model, own, *own.training_targets(REPORTED)))
        scored = _users(histories, folds == fold)
        cross_fitted.append(mean_log_probability(model, scored, *scored.training_targets(REPORTED)))
    rows = np.flatnonzero(histories.validation >= 1)
    rows = rows[evenly_spaced(len(rows), REPORTED)]
    full = read_model(work / "full.safetensors", config, split).to(device)
    validation = mean_log_probability(full, histories, rows, histories.validation[rows])
    return {
        "in_fold": _pool(in_fold),
        "cross_fitted": _pool(cross_fitted),
        "validation": validation,
    }


def _pool(parts: list[dict[str, float]]) -> dict[str, float]:
    targets = sum(part["targets"] for part in parts)
    known = sum(part["targets"] * part["known_share"] for part in parts)
    log_p = sum(part["mean_log_p"] * part["targets"] * part["known_share"] for part in parts)
    return {
        "mean_log_p": log_p / max(1.0, known),
        "targets": targets,
        "known_share": known / max(1, targets),
    }
