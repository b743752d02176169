"""The CF stage: one model per fold for cross-fitted rewards and one on all users, with their report (METHOD.md §5); `ilrec cf` runs it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.cf.code_order import index_kind, write_code_order
from ilrec_dist.cf.fit import Histories, Progress, mean_log_probability, train_model
from ilrec_dist.cf.folder import models_manifest, read_model, write_manifest
from ilrec_dist.cf.table import Split
from ilrec_dist.config import CFConfig
from ilrec_dist.data.files import put_in_place, read_json_object, write_json
from ilrec_dist.data.prepared import Prepared
from ilrec_dist.errors import UserError
from ilrec_dist.items.catalogue import Catalogue

BEGUN = "begun.json"  # in the folder of unfinished work: what the work is


def user_folds(user_ids: Iterable[str], folds: int) -> np.ndarray:
    """The fold of each user, int64 [U]: the first 8 bytes of BLAKE2b(user id in UTF-8), big-endian, modulo `folds`.

    It depends on the id alone, so no user's data, nor the presence of other users, moves anyone to another fold.
    """
    digests = b"".join(hashlib.blake2b(user.encode(), digest_size=8).digest() for user in user_ids)
    return (np.frombuffer(digests, dtype=">u8") % np.uint64(folds)).astype(np.int64)


def train_cf(
    config: CFConfig,
    prepared: Prepared,
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
    Models that a killed process finished with the same settings and data are taken from it. Deterministic for a seed, a number of torch threads and of parts.
    Raises UserError when a fold leaves too few users to train on.
    """
    started = time.perf_counter()
    index_kind(config, prepared.num_items)  # what cannot be served is refused before it is trained
    split = split or Split(prepared.num_items)
    histories = Histories(prepared.items, prepared.offsets[:-1], prepared.train_lengths(), prepared.target_places("validation"))
    folds = user_folds(prepared.user_ids, config.cf_folds)
    manifest = models_manifest(config, prepared)
    with _unfinished(Path(out), manifest | {"parts": split.parts}, split) as work:
        trainings = {"full": (histories, config.seed)}
        if config.cf_folds > 1:
            trainings |= {f"fold{fold}": (_users(histories, folds != fold), config.seed * 1_000_003 + fold + 1) for fold in range(config.cf_folds)}
        reports = {name: _trained(config, split, users, work / name, seed, progress, device) for name, (users, seed) in trainings.items()}
        if config.cf_folds == 1 and split.part == 0:
            shutil.copyfile(work / "full.safetensors", work / "fold0.safetensors")
        split.barrier()
        report = {"folds": config.cf_folds, "models": reports, "log_p": _log_probabilities(config, split, histories, folds, work, device)}
        report["seconds"] = time.perf_counter() - started
        if split.part == 0:
            for note in (BEGUN, *(f"{name}.json" for name in trainings)):
                (work / note).unlink()
            np.save(work / "folds.npy", folds.astype(np.int32))
            write_json(work / "report.json", report)
            write_manifest(work, manifest)
            if catalogue is not None:
                write_code_order(config, work, catalogue)
            put_in_place(work, Path(out))
        split.barrier()
    return report


@contextmanager
def _unfinished(out: Path, task: dict[str, Any], split: Split) -> Iterator[Path]:
    """The folder in which models gather until all are there. It stays when this process is killed, for the next one with the same task."""
    work = out.with_name(f".{out.name}.unfinished")
    if split.part == 0:
        if not (work / BEGUN).exists() or read_json_object(work / BEGUN) != task:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            write_json(work / BEGUN, task)
    split.barrier()
    try:
        yield work
    except UserError:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _trained(config: CFConfig, split: Split, histories: Histories, path: Path, seed: int, progress: Progress | None, device: str) -> dict[str, Any]:
    """The report of the model at `path`.safetensors, which is trained unless it is there: its report, `path`.json, comes last."""
    done = path.with_suffix(".json")
    report: dict[str, Any] | None = split.told(read_json_object(done) if split.part == 0 and done.exists() else None)
    if report is not None:
        if progress is not None:
            progress({"model": path.name, "epochs": config.epochs, "seconds": report["seconds"], **report["curve"][-1]})
        return report
    report = train_model(config, split, histories, path.with_suffix(".safetensors"), seed, progress, device)
    if split.part == 0:
        staged = path.with_suffix(".json.writing")
        write_json(staged, report)
        os.replace(staged, done)
    return report


def _users(histories: Histories, chosen: np.ndarray) -> Histories:
    parts = {name: getattr(histories, name)[chosen] for name in ("starts", "training_lengths", "validation")}
    return dataclasses.replace(histories, **parts)


def _log_probabilities(config: CFConfig, split: Split, histories: Histories, folds: np.ndarray, work: Path, device: str) -> dict[str, Any]:
    """Mean log P_CF(y): on targets a fold model was trained on, on those it scores, and of the full model on validation targets.

    The first exceeds the third by what a model remembers of its own targets; the second should not.
    """
    crossed = config.cf_folds > 1
    in_fold, cross_fitted = [], []
    for fold in range(config.cf_folds):
        model = read_model(work / f"fold{fold}.safetensors", config, split).to(device)
        own = _users(histories, folds != fold if crossed else folds == fold)
        in_fold.append(mean_log_probability(model, own, *own.training_targets()))
        scored = _users(histories, folds == fold)
        cross_fitted.append(mean_log_probability(model, scored, *scored.training_targets()))
    rows = np.flatnonzero(histories.validation >= 1)
    full = read_model(work / "full.safetensors", config, split).to(device)
    validation = mean_log_probability(full, histories, rows, histories.validation[rows])
    return {"in_fold": _pool(in_fold), "cross_fitted": _pool(cross_fitted), "validation": validation}


def _pool(parts: list[dict[str, float]]) -> dict[str, float]:
    targets = sum(part["targets"] for part in parts)
    known = sum(part["targets"] * part["known_share"] for part in parts)
    log_p = sum(part["mean_log_p"] * part["targets"] * part["known_share"] for part in parts)
    return {"mean_log_p": log_p / max(1.0, known), "targets": targets, "known_share": known / max(1, targets)}
