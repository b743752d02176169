"""Fits one SASRec to some users' training sequences (METHOD.md §5)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.sasrec.checkpoint import save_model
from ilrec_dist.cf.sasrec.model import SASRec, encode, pad_histories, window_stride
from ilrec_dist.cf.sasrec.sharded_table import ItemShard, full_softmax_loss
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.ragged import ragged_arange
from ilrec_dist.data.dataset import ItemArray

# Called after each epoch with: model, epoch, epochs, loss, ndcg@10 (validation) and seconds.
OnEpoch = Callable[[dict[str, Any]], None]
# The fp32 scores of a validation batch.
SCORE_ELEMENTS = 1 << 26
# Users whose training items are looked up in one step.
USER_ROWS = 100_000


@dataclass(frozen=True)
class TrainingSequences:
    """The part of some users' interactions that a CF model may see.

    That is the training part, and for validation the items up to that target.
    """

    # int32 [T], all users' interactions.
    items: ItemArray
    # int64 [u]: where each user begins in them.
    starts: np.ndarray
    # int64 [u]: the length of each user's training part.
    training_lengths: np.ndarray
    # int64 [u]: the position of the validation target in the user's sequence; below 1: none.
    validation: np.ndarray

    def select(self, users: np.ndarray) -> TrainingSequences:
        """The same for some of the users: bool [u], or indices."""
        return TrainingSequences(
            self.items, self.starts[users], self.training_lengths[users], self.validation[users]
        )

    def training_targets(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """(row of `starts`, position) of every training item but each user's first.

        Where there are more than `limit`, that many of them, evenly spaced.
        """
        ends = np.append(0, np.cumsum(np.maximum(self.training_lengths - 1, 0)))
        chosen = evenly_spaced(int(ends[-1]), limit)
        rows = np.searchsorted(ends, chosen, side="right") - 1
        return rows, chosen - ends[rows] + 1

    def known_items(self, num_items: int) -> np.ndarray:
        """bool [num_items]: the items that occur in the training part."""
        known = np.zeros(num_items, dtype=bool)
        # A range of users at a time: no array as long as all interactions is made.
        for low in range(0, len(self.starts), USER_ROWS):
            lengths = self.training_lengths[low : low + USER_ROWS]
            starts = np.repeat(self.starts[low : low + USER_ROWS], lengths)
            known[self.items[starts + ragged_arange(lengths)]] = True
        return known


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """int64: 0 … count − 1, or `limit` of them from the first to the last."""
    return np.arange(count) if count <= limit else np.linspace(0, count - 1, limit).astype(np.int64)


def fit_sasrec(
    config: CFConfig,
    shard: ItemShard,
    sequences: TrainingSequences,
    path: Path,
    seed: int,
    on_epoch: OnEpoch | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train one model and write its best epoch to `path` (NAME.safetensors).

    The best epoch has the highest validation NDCG@10 over the same users; training
    stops after `patience` epochs without a better one. Everything that is random comes
    from `seed` and everything else from `sequences`: users left out leave no trace. The
    caller's RNG is restored. Of a sharded table every process trains the rows of its
    shard, and the rest of the model is the same in all of them. Returns the report:
    users, the best epoch and its NDCG@10, loss and NDCG@10 by epoch, seconds.

    Raises UserError when no user has two training items, and when the training
    diverges.
    """
    name = path.stem
    windows = sasrec_windows(sequences, config.max_history)
    if not len(windows[0]):
        raise UserError(
            f"CF model {name!r}: none of its {len(sequences.starts)} users has two training "
            "items; give it more users, or a lower cf.cf_folds"
        )
    with torch.random.fork_rng(devices=[] if device == "cpu" else [torch.cuda.current_device()]):
        torch.manual_seed(seed)
        model = SASRec.from_config(config, shard)
        model.known.copy_(torch.from_numpy(sequences.known_items(shard.num_items)))
        model.to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.98),
            fused=True,
        )
        order = np.random.default_rng(seed)
        best: dict[str, Any] = {"epoch": 0, "ndcg@10": -1.0}
        curve: list[dict[str, float]] = []
        started = time.perf_counter()
        for epoch in range(1, config.epochs + 1):
            loss = _train_epoch(model, optimizer, sequences, windows, config.batch_size, order)
            if not math.isfinite(loss):
                raise _diverged(config, name, epoch, f"loss {loss:g}")
            try:
                ndcg = validation_ndcg(model, sequences)
            except FloatingPointError:
                # The last step of the epoch, after its loss was computed, was one too many.
                raise _diverged(config, name, epoch, f"loss {loss:g}, then scores nan") from None
            # Rank 0's value, so that all processes agree on the best epoch.
            ndcg = shard.broadcast_object(ndcg)
            curve.append({"epoch": epoch, "loss": loss, "ndcg@10": ndcg})
            if on_epoch is not None:
                seconds = time.perf_counter() - started
                on_epoch({"model": name, "epochs": config.epochs, "seconds": seconds, **curve[-1]})
            if ndcg > best["ndcg@10"]:
                best = curve[-1]
                save_model(path, model)
            elif epoch - best["epoch"] >= config.patience:
                break
    return {
        "users": len(sequences.starts),
        "best_epoch": best["epoch"],
        "validation_ndcg@10": best["ndcg@10"],
        "curve": curve,
        "seconds": time.perf_counter() - started,
    }


def _train_epoch(
    model: SASRec,
    optimizer: torch.optim.Optimizer,
    sequences: TrainingSequences,
    windows: tuple[np.ndarray, np.ndarray, np.ndarray],
    batch_size: int,
    order: np.random.Generator,
) -> float:
    """Train one epoch over all windows; the mean loss of its targets.

    Stops where the loss is no longer finite, and returns that.
    """
    begin, count, first_new = windows
    shard = model.items.shard
    replicated = [
        parameter for name, parameter in model.named_parameters() if name != "items.weight"
    ]
    model.train()
    total, targets = 0.0, 0
    for batch in batches_by_length(count, batch_size, order):
        loss, rows = window_loss(
            model, sequences.items, begin[batch], count[batch], first_new[batch]
        )
        optimizer.zero_grad(set_to_none=True)
        (loss / rows).backward()  # type: ignore[no-untyped-call]
        broadcast_gradients(replicated, shard)
        optimizer.step()
        total, targets = total + float(loss.detach()), targets + rows
        if not math.isfinite(total):
            break
    return total / targets


def _diverged(config: CFConfig, name: str, epoch: int, figures: str) -> UserError:
    return UserError(
        f"CF model {name!r} diverged in epoch {epoch} ({figures}); lower cf.learning_rate "
        f"(now {config.learning_rate:g}) and run `ilrec cf` again"
    )


def broadcast_gradients(parameters: list[nn.Parameter], shard: ItemShard) -> None:
    """Give all processes rank 0's gradients of replicated parameters.

    The others differ by rounding if at all; so what is replicated stays the same to the
    bit.
    """
    if shard.world_size > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = shard.broadcast(torch.cat([gradient.flatten() for gradient in gradients]))
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()


def sasrec_windows(
    sequences: TrainingSequences, max_history: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows in which every training item but each user's first is a target once.

    Returns int64 [W] each: where a window's inputs begin in `sequences.items`; how many
    inputs it has, each with the item after it as its target; and the first input whose
    target no earlier window has.
    """
    stride, lengths = window_stride(max_history), sequences.training_lengths
    more_windows = (np.maximum(lengths - 1 - max_history, 0) + stride - 1) // stride
    windows = np.where(lengths < 2, 0, 1 + more_windows)
    skipped = ragged_arange(windows) * stride
    begin = np.repeat(sequences.starts, windows) + skipped
    count = np.minimum(np.repeat(lengths, windows) - 1 - skipped, max_history)
    return begin, count, np.where(skipped > 0, max_history - stride, 0)


def batches_by_length(
    lengths: np.ndarray, batch_size: int, order: np.random.Generator, pool: int = 64
) -> list[np.ndarray]:
    """A shuffled epoch in batches of windows of similar length.

    The windows are shuffled, sorted by length within pools of 64 batches, and the
    batches shuffled again.
    """
    shuffled = order.permutation(len(lengths))
    batches = []
    for start in range(0, len(shuffled), pool * batch_size):
        pooled = shuffled[start : start + pool * batch_size]
        pooled = pooled[np.argsort(lengths[pooled], kind="stable")]
        batches += [pooled[i : i + batch_size] for i in range(0, len(pooled), batch_size)]
    return [batches[i] for i in order.permutation(len(batches))]


def window_loss(
    model: SASRec, items: ItemArray, begin: np.ndarray, count: np.ndarray, first_new: np.ndarray
) -> tuple[Tensor, int]:
    """(summed cross-entropy of a batch of windows, the number of its targets).

    begin, count and first_new are those of `sasrec_windows`, for the windows of the
    batch.
    """
    inputs = pad_histories(items, begin, count)
    hidden = model(inputs.to(model.device))
    columns = np.arange(inputs.shape[1])
    rows = np.flatnonzero((columns < count[:, None]) & (columns >= first_new[:, None]))
    targets = items[(begin[:, None] + 1 + columns).reshape(-1)[rows]].astype(np.int64)
    loss = full_softmax_loss(
        hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(rows).to(model.device)],
        model.items.weight,
        torch.from_numpy(targets).to(model.device),
        model.items.shard,
    )
    return loss, len(rows)


@torch.no_grad()
def validation_ndcg(model: SASRec, sequences: TrainingSequences) -> float:
    """Mean NDCG@10 of each user's validation item; 0 without users.

    Full ranking, items of the history kept, ties in item order. Raises
    FloatingPointError where a score is not finite.
    """
    users = np.flatnonzero(sequences.validation >= 1)
    total = 0.0
    for batch in _score_batches(model, len(users), 512):
        chosen = users[batch]
        targets, logits = _target_logits(model, sequences, chosen, sequences.validation[chosen])
        ranks = model.items.ranks(targets, logits)
        total += float((1.0 / torch.log2(ranks.double() + 2))[ranks < 10].sum())
    return total / max(1, len(users))


@torch.no_grad()
def mean_log_probability(
    model: SASRec, sequences: TrainingSequences, rows: np.ndarray, positions: np.ndarray
) -> dict[str, float]:
    """Mean log P_CF(y) over the targets (row of sequences.starts, position) int64 [R].

    Taken over the targets whose item the model knows; `known_share` is the share of
    those.
    """
    shard = model.items.shard
    unknown = ~model.known[shard.start : shard.stop]
    total, known = 0.0, 0
    for batch in _score_batches(model, len(rows), 1024):
        targets, logits = _target_logits(model, sequences, rows[batch], positions[batch])
        target_logits = model.items.target_logits(targets, logits)[:, 0]
        logits[:, unknown] = -torch.inf
        row_max = shard.all_reduce_max(logits.amax(1))
        sum_exp = shard.all_reduce_sum((logits - row_max[:, None]).exp_().sum(1))
        log_p = target_logits - row_max - sum_exp.log()
        is_known = model.known[targets]
        total += float(log_p[is_known].double().sum())
        known += int(is_known.sum())
    return {
        "mean_log_p": total / max(1, known),
        "targets": len(rows),
        "known_share": known / max(1, len(rows)),
    }


def _score_batches(model: SASRec, num_rows: int, most: int) -> list[slice]:
    size = max(1, min(most, SCORE_ELEMENTS * model.items.shard.world_size // model.num_items))
    return [slice(first, first + size) for first in range(0, num_rows, size)]


def _target_logits(
    model: SASRec, sequences: TrainingSequences, rows: np.ndarray, positions: np.ndarray
) -> tuple[Tensor, Tensor]:
    """(items of targets int64 [R], logits of this shard's items fp32 [R, n_local])."""
    starts = sequences.starts[rows]
    targets = torch.from_numpy(sequences.items[starts + positions].astype(np.int64))
    logits = model.items.logits(encode(model, sequences.items, starts, positions))
    return targets.to(model.device), logits
