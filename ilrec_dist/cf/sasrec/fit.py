"""Fits one SASRec to some users' training sequences, with early stopping on those same users (METHOD.md §5)."""

from __future__ import annotations

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
from ilrec_dist.cf.sasrec.sharded_table import Split, full_softmax_loss
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.ragged import ragged_arange
from ilrec_dist.data.dataset import ItemArray

Progress = Callable[[dict[str, Any]], None]
SCORES_AT_ONCE = 1 << 26  # fp32 of a validation batch


@dataclass(frozen=True)
class Histories:
    """Some users' interactions, as the trainer sees them: only the training part, and for validation the items up to that target."""

    items: ItemArray  # int32 [T], all users' interactions
    starts: np.ndarray  # int64 [u]
    training_lengths: np.ndarray  # int64 [u]
    validation: (
        np.ndarray
    )  # int64 [u], place of the validation target in the user's sequence; below 1: none

    def training_targets(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """(row of `starts`, position) of every training item but each user's first; of more than `limit` that many, evenly spaced."""
        ends = np.append(0, np.cumsum(np.maximum(self.training_lengths - 1, 0)))
        chosen = evenly_spaced(int(ends[-1]), limit)
        rows = np.searchsorted(ends, chosen, side="right") - 1
        return rows, chosen - ends[rows] + 1

    def known_items(self, num_items: int) -> np.ndarray:
        """bool [num_items]: what occurs in the training part."""
        known = np.zeros(num_items, dtype=bool)
        for low in range(
            0, len(self.starts), 100_000
        ):  # users at a time: nothing as long as all interactions is made
            lengths = self.training_lengths[low : low + 100_000]
            known[
                self.items[
                    np.repeat(self.starts[low : low + 100_000], lengths) + ragged_arange(lengths)
                ]
            ] = True
        return known


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """int64: 0 … count − 1, or `limit` of them from the first to the last."""
    return np.arange(count) if count <= limit else np.linspace(0, count - 1, limit).astype(np.int64)


def train_model(
    config: CFConfig,
    split: Split,
    histories: Histories,
    path: Path,
    seed: int,
    progress: Progress | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train on the training part of `histories`, keep the epoch with the best validation NDCG@10 over these same users, stop after `patience` worse ones.

    Everything that is random comes from `seed` and everything else from `histories`: users left out leave no trace. The caller's RNG is restored.
    The best epoch's model is written to `path` (NAME.safetensors) whenever there is a better one. Of a split table every process trains its own rows, and the
    rest of the model is the same in all of them. Returns the report: epochs run, the best one, loss and NDCG@10 by epoch, seconds.
    Raises UserError when no user has two training items.
    """
    begin, count, fresh = training_windows(histories, config.max_history)
    if not len(begin):
        raise UserError(
            f"CF model {path.stem!r}: none of its {len(histories.starts)} users has two training items; give it more users, or a lower cf.cf_folds"
        )
    with torch.random.fork_rng(devices=[] if device == "cpu" else [torch.cuda.current_device()]):
        torch.manual_seed(seed)
        model = SASRec.from_config(config, split)
        model.known.copy_(torch.from_numpy(histories.known_items(split.num_items)))
        model.to(device)
        shared = [
            parameter for name, parameter in model.named_parameters() if name != "items.weight"
        ]
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
            model.train()
            total, targets = 0.0, 0
            for batch in batches_by_length(count, config.batch_size, order):
                loss, rows = window_loss(
                    model, histories.items, begin[batch], count[batch], fresh[batch]
                )
                optimizer.zero_grad(set_to_none=True)
                (loss / rows).backward()  # type: ignore[no-untyped-call]
                _agree(shared, split)
                optimizer.step()
                total, targets = total + float(loss.detach()), targets + rows
            ndcg = split.told(
                validation_ndcg(model, histories)
            )  # the same to the bit, or parts might differ in what is best
            curve.append({"epoch": epoch, "loss": total / targets, "ndcg@10": ndcg})
            if progress is not None:
                progress(
                    {
                        "model": path.stem,
                        "epochs": config.epochs,
                        "seconds": time.perf_counter() - started,
                        **curve[-1],
                    }
                )
            if ndcg > best["ndcg@10"]:
                best = curve[-1]
                save_model(path, model)
            elif epoch - best["epoch"] >= config.patience:
                break
    seconds = time.perf_counter() - started
    return {
        "users": len(histories.starts),
        "best_epoch": best["epoch"],
        "validation_ndcg@10": best["ndcg@10"],
        "curve": curve,
        "seconds": seconds,
    }


def _agree(parameters: list[nn.Parameter], split: Split) -> None:
    """All processes take the first one's gradients, which theirs differ from by rounding if at all, so that what they share stays the same to the bit."""
    if split.parts > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        agreed = split.first(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, values in zip(
            gradients, agreed.split([gradient.numel() for gradient in gradients]), strict=True
        ):
            gradient.copy_(values.view_as(gradient))


def training_windows(
    histories: Histories, max_history: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The windows in which every training item but each user's first is a target exactly once.

    int64 [W] each: where a window's inputs begin in `histories.items`; how many inputs, each with the item after it as its target;
    the first of them whose target is not another window's.
    """
    stride, lengths = window_stride(max_history), histories.training_lengths
    windows = np.where(
        lengths < 2, 0, 1 + (np.maximum(lengths - 1 - max_history, 0) + stride - 1) // stride
    )
    skipped = ragged_arange(windows) * stride
    begin = np.repeat(histories.starts, windows) + skipped
    count = np.minimum(np.repeat(lengths, windows) - 1 - skipped, max_history)
    return begin, count, np.where(skipped > 0, max_history - stride, 0)


def batches_by_length(
    lengths: np.ndarray, batch_size: int, order: np.random.Generator, pool: int = 64
) -> list[np.ndarray]:
    """A shuffled epoch in batches of windows of like length: shuffled, sorted by length within pools of 64 batches, and shuffled again by batch."""
    shuffled = order.permutation(len(lengths))
    batches = []
    for start in range(0, len(shuffled), pool * batch_size):
        part = shuffled[start : start + pool * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in order.permutation(len(batches))]


def window_loss(
    model: SASRec, items: ItemArray, begin: np.ndarray, count: np.ndarray, fresh: np.ndarray
) -> tuple[torch.Tensor, int]:
    """Summed full-softmax cross-entropy of a batch of training windows, and how many targets it sums."""
    inputs = pad_histories(items, begin, count)
    hidden = model(inputs.to(model.device))
    columns = np.arange(inputs.shape[1])
    rows = np.flatnonzero((columns < count[:, None]) & (columns >= fresh[:, None]))
    targets = items[(begin[:, None] + 1 + columns).reshape(-1)[rows]].astype(np.int64)
    picked = hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(rows).to(model.device)]
    return full_softmax_loss(
        picked, model.items.weight, torch.from_numpy(targets).to(model.device), model.items.split
    ), len(rows)


@torch.no_grad()
def validation_ndcg(model: SASRec, histories: Histories) -> float:
    """Mean NDCG@10 of each user's validation item, full ranking, history items kept, ties in item order; 0 without users."""
    users = np.flatnonzero(histories.validation >= 1)
    total = 0.0
    for batch in _batches(model, len(users), 512):
        wanted, logits = _scored(model, histories, users[batch], histories.validation[users[batch]])
        rank = model.items.rank(wanted, logits)
        total += float((1.0 / torch.log2(rank.double() + 2))[rank < 10].sum())
    return total / max(1, len(users))


@torch.no_grad()
def mean_log_probability(
    model: SASRec, histories: Histories, rows: np.ndarray, positions: np.ndarray
) -> dict[str, float]:
    """Mean log P_CF(y) over the targets (row of histories.starts, position) whose item the model knows, and the share of those."""
    split = model.items.split
    unknown = ~model.known[split.start : split.stop]
    total, known = 0.0, 0
    for batch in _batches(model, len(rows), 1024):
        wanted, logits = _scored(model, histories, rows[batch], positions[batch])
        own = model.items.logits_of(wanted, logits)[:, 0]
        logits[:, unknown] = -torch.inf
        top = split.max(logits.amax(1))
        log_p = own - top - split.sum((logits - top[:, None]).exp_().sum(1)).log()
        seen = model.known[wanted]
        total, known = total + float(log_p[seen].double().sum()), known + int(seen.sum())
    return {
        "mean_log_p": total / max(1, known),
        "targets": len(rows),
        "known_share": known / max(1, len(rows)),
    }


def _batches(model: SASRec, rows: int, most: int) -> list[slice]:
    size = max(1, min(most, SCORES_AT_ONCE * model.items.split.parts // model.num_items))
    return [slice(first, first + size) for first in range(0, rows, size)]


def _scored(
    model: SASRec, histories: Histories, rows: np.ndarray, positions: np.ndarray
) -> tuple[Tensor, Tensor]:
    """The item of each target (row of histories.starts, position), int64 [R], and the logits of this part's items there, fp32 [R, stop − start]."""
    first = histories.starts[rows]
    wanted = torch.from_numpy(histories.items[first + positions].astype(np.int64)).to(model.device)
    return wanted, model.items.logits(encode(model, histories.items, first, positions))
