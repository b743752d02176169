"""Trains the sequence models and scores with them.

As SASRec: full-softmax cross-entropy over the training items but each user's
first, the best epoch by validation NDCG@10, and the settings of the section `cf`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.sasrec.fit import TrainingSequences, batches_by_length, sasrec_windows
from ilrec_dist.cf.sasrec.model import pad_histories
from ilrec_dist.cf.sasrec.sharded_table import full_softmax_loss
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder, read_json_object, write_json
from ilrec_dist.common.manifest import MANIFEST, verified, write_manifest
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.evaluation.baselines.sequence_models import MODELS, SequenceModel
from ilrec_dist.evaluation.metrics import per_user, ranks_of_scores

WEIGHTS, REPORT = "model.safetensors", "report.json"
# Users whose validation items are ranked at once.
VALIDATION_USERS = 512
# Called after each epoch with its number and its validation NDCG@10.
OnEpoch = Callable[[int, float], None]


def train_baseline(
    name: str,
    config: CFConfig,
    training: InteractionDataset,
    dataset: InteractionDataset,
    out: Path,
    on_epoch: OnEpoch | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train one of MODELS and write its folder, whole or not at all.

    `training` are the sequences that it is trained on, `dataset` without the ones that
    are read backwards. Deterministic for a seed and a number of threads. Returns the
    report. Raises UserError where no user has two training items, and where the
    training diverges.
    """
    with (
        torch.random.fork_rng(devices=[] if device == "cpu" else [torch.cuda.current_device()]),
        committed_folder(out) as staged,
    ):
        torch.manual_seed(config.seed)
        model = MODELS[name](config, dataset.num_items, dataset.num_users).to(device)
        report = _fit(name, model, config, training, dataset, staged / WEIGHTS, on_epoch)
        write_json(staged / REPORT, report)
        write_manifest(
            staged,
            {
                "model": name,
                "config": config_to_dict(config),
                "items": dataset.num_items,
                "users": dataset.num_users,
            },
        )
    return report


def _fit(
    name: str,
    model: SequenceModel,
    config: CFConfig,
    training: InteractionDataset,
    dataset: InteractionDataset,
    path: Path,
    on_epoch: OnEpoch | None,
) -> dict[str, Any]:
    sequences = TrainingSequences(
        training.items,
        training.offsets[:-1],
        training.train_lengths(),
        training.target_positions("validation"),
    )
    begin, count, first_new = sasrec_windows(sequences, config.max_history)
    if not len(begin):
        raise UserError(
            f"baseline {name}: no user has two training items; lower "
            "data.min_user_interactions or bring more data"
        )
    # A user who is read backwards has the vector of the one who is read forwards.
    user = np.searchsorted(training.offsets, begin, side="right") - 1
    user %= dataset.num_users
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.98),
    )
    device, order, started = model.table.device, np.random.default_rng(config.seed), time.time()
    best, best_epoch, curve = -1.0, 0, []
    for epoch in range(1, config.epochs + 1):
        model.train()
        total, targets = 0.0, 0
        for batch in batches_by_length(count, config.batch_size, order):
            inputs = pad_histories(training.items, begin[batch], count[batch])
            columns = np.arange(inputs.shape[1])
            is_target = (columns < count[batch, None]) & (columns >= first_new[batch, None])
            rows = np.flatnonzero(is_target)
            following = training.items[(begin[batch, None] + 1 + columns).reshape(-1)[rows]]
            queries = model(inputs.to(device), _tensor(user[batch], device), _tensor(rows, device))
            loss = full_softmax_loss(queries, model.table, _tensor(following, device))
            optimizer.zero_grad(set_to_none=True)
            (loss / len(rows)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total, targets = total + float(loss.detach()), targets + len(rows)
        ndcg = _validation_ndcg(model, dataset, config.max_history)
        if not (math.isfinite(total) and math.isfinite(ndcg)):
            raise UserError(
                f"baseline {name} diverged in epoch {epoch} (loss {total / targets:g}); lower "
                f"cf.learning_rate (now {config.learning_rate:g})"
            )
        curve.append({"epoch": epoch, "loss": total / targets, "ndcg@10": ndcg})
        if on_epoch is not None:
            on_epoch(epoch, ndcg)
        if ndcg > best:
            best, best_epoch = ndcg, epoch
            state = {key: value.contiguous() for key, value in model.state_dict().items()}
            save_file(state, path)
        elif epoch - best_epoch >= config.patience:
            break
    return {
        "best_epoch": best_epoch,
        "validation_ndcg@10": best,
        "curve": curve,
        "seconds": time.time() - started,
    }


def _validation_ndcg(model: SequenceModel, dataset: InteractionDataset, max_history: int) -> float:
    """Mean NDCG@10 of the validation items, items
    of the history kept; NaN for bad scores.
    """
    users, total = dataset.evaluated("validation"), 0.0
    for first in range(0, len(users), VALIDATION_USERS):
        batch = users[first : first + VALIDATION_USERS]
        scores = sequence_scores(model, dataset, batch, "validation", max_history)
        if not np.isfinite(scores).all():
            return math.nan
        ranks = ranks_of_scores(scores, dataset.targets("validation", batch))
        total += float(per_user(ranks)["ndcg@10"].sum())
    return total / max(1, len(users))


@torch.no_grad()
def sequence_scores(
    model: SequenceModel,
    dataset: InteractionDataset,
    users: np.ndarray,
    split: str,
    max_history: int,
) -> np.ndarray:
    """float32 [len(users), num_items]: logits of every item as the target of `split`.

    The history is the last `max_history` items before the target.
    """
    model.eval()
    device = model.table.device
    stop = dataset.history_stop(split, users)
    lengths = np.minimum(stop - dataset.offsets[users], max_history)
    inputs = pad_histories(dataset.items, stop - lengths, lengths)
    rows = np.arange(len(users)) * inputs.shape[1] + lengths - 1
    queries = model(inputs.to(device), _tensor(users, device), _tensor(rows, device))
    scores: np.ndarray = (queries @ model.table.t()).cpu().numpy()
    return scores


def load_baseline(folder: Path) -> tuple[SequenceModel, int]:
    """A trained model in eval mode, and how many items it reads.

    Raises UserError where the folder is none of `train_baseline`, or a file is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder}: no trained baseline (no {MANIFEST}); run `ilrec cf` first")
    manifest = read_json_object(path)
    config = CFConfig(**manifest["config"])
    with torch.device("meta"):
        model = MODELS[manifest["model"]](config, manifest["items"], manifest["users"])
    model.load_state_dict(load_file(verified(folder, WEIGHTS)), assign=True)
    return model.eval(), config.max_history


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.int64)).to(device)
