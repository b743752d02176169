"""The CF stage: one model per fold for cross-fitted rewards and one on all users, with their report (METHOD.md §5); `ilrec cf` runs it."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.cf.code_order import index_kind, write_code_order
from ilrec_dist.cf.fit import Histories, Progress, mean_log_probability, train_model
from ilrec_dist.cf.folder import models_manifest, save_model, write_manifest
from ilrec_dist.cf.model import SASRec
from ilrec_dist.config import CFConfig
from ilrec_dist.data.files import committed_folder, write_json
from ilrec_dist.data.prepared import Prepared
from ilrec_dist.items.catalogue import Catalogue


def user_folds(user_ids: Iterable[str], folds: int) -> np.ndarray:
    """The fold of each user, int64 [U]: the first 8 bytes of BLAKE2b(user id in UTF-8), big-endian, modulo `folds`.

    It depends on the id alone, so no user's data, nor the presence of other users, moves anyone to another fold.
    """
    digests = b"".join(hashlib.blake2b(user.encode(), digest_size=8).digest() for user in user_ids)
    return (np.frombuffer(digests, dtype=">u8") % np.uint64(folds)).astype(np.int64)


def train_cf(
    config: CFConfig, prepared: Prepared, catalogue: Catalogue | None, out: str | Path, progress: Progress | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Train all CF models and write their folder, whole or not at all; returns the report that is also written as report.json.

    Users are hashed into `cf_folds` by `user_folds`. Fold k's users are scored by a model to which they do not exist: its item counts, batches,
    random numbers and early stopping come from the other users alone. With cf_folds = 1 there are no others: the one model has seen every target.
    With a catalogue also what `write_code_order` makes for it, which rewards need; it may be called later as well. `progress` is called after each
    epoch with model, epoch, epochs, loss, ndcg@10 (validation) and seconds.
    Deterministic for a seed and a number of torch threads. Raises UserError when a fold leaves too few users to train on.
    """
    started = time.perf_counter()
    index_kind(config, prepared.num_items)  # what cannot be served is refused before it is trained
    histories = Histories(prepared.items, prepared.offsets[:-1], prepared.train_lengths(), prepared.target_places("validation"))
    folds = user_folds(prepared.user_ids, config.cf_folds)
    with committed_folder(out) as work:
        full, full_report = train_model(config, prepared.num_items, histories, "full", config.seed, progress, device)
        save_model(work, "full", full)
        report: dict[str, Any] = {"folds": config.cf_folds, "models": {"full": full_report}}
        models = []
        for fold in range(config.cf_folds):
            model = full
            if config.cf_folds > 1:
                others = _users(histories, folds != fold)
                model, report["models"][f"fold{fold}"] = train_model(
                    config, prepared.num_items, others, f"fold{fold}", config.seed * 1_000_003 + fold + 1, progress, device
                )
            save_model(work, f"fold{fold}", model)
            models.append(model)
        np.save(work / "folds.npy", folds.astype(np.int32))
        report["log_p"] = _log_probabilities(histories, folds, full, models)
        report["seconds"] = time.perf_counter() - started
        write_json(work / "report.json", report)
        write_manifest(work, models_manifest(config, prepared))
        if catalogue is not None:
            write_code_order(config, work, catalogue)
    return report


def _users(histories: Histories, chosen: np.ndarray) -> Histories:
    parts = {name: getattr(histories, name)[chosen] for name in ("starts", "training_lengths", "validation")}
    return dataclasses.replace(histories, **parts)


def _log_probabilities(histories: Histories, folds: np.ndarray, full: SASRec, models: list[SASRec]) -> dict[str, Any]:
    """Mean log P_CF(y): on targets a fold model was trained on, on those it scores, and of the full model on validation targets.

    The first exceeds the third by what a model remembers of its own targets; the second should not.
    """
    crossed = len(models) > 1
    in_fold, cross_fitted = [], []
    for fold, model in enumerate(models):
        own = _users(histories, folds != fold if crossed else folds == fold)
        in_fold.append(mean_log_probability(model, own, *own.training_targets()))
        scored = _users(histories, folds == fold)
        cross_fitted.append(mean_log_probability(model, scored, *scored.training_targets()))
    rows = np.flatnonzero(histories.validation >= 1)
    validation = mean_log_probability(full, histories, rows, histories.validation[rows])
    return {"in_fold": _pool(in_fold), "cross_fitted": _pool(cross_fitted), "validation": validation}


def _pool(parts: list[dict[str, float]]) -> dict[str, float]:
    targets = sum(part["targets"] for part in parts)
    known = sum(part["targets"] * part["known_share"] for part in parts)
    log_p = sum(part["mean_log_p"] * part["targets"] * part["known_share"] for part in parts)
    return {"mean_log_p": log_p / max(1.0, known), "targets": targets, "known_share": known / max(1, targets)}
