"""Predictions by beam search with a model and by full ranking (METHOD.md §9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.evaluation.baselines.table import BASELINES, BaselineInputs, Scorer
from ilrec_dist.evaluation.log_probabilities import LogP, listed_log_p
from ilrec_dist.evaluation.metrics import first_column, ranks_of_scores
from ilrec_dist.evaluation.predictions import Predictions, concatenate_predictions
from ilrec_dist.inference.beam_search import RankedItems
from ilrec_dist.inference.inputs import HistoryRanges
from ilrec_dist.inference.ranker import ModelRanker, RankingProgress

# Items that the predictions of a full ranking keep.
KEPT_ITEMS = 20
# Scores that a full ranking computes at once.
CHUNK_SCORES = 1 << 22


def evaluate_model(
    model: ModelRanker,
    dataset: InteractionDataset,
    *,
    users: np.ndarray,
    split: str,
    exclude_seen: bool,
    progress: RankingProgress | None = None,
) -> Predictions:
    """Beam search for `users` (distinct, int [n]) on `split` ("validation" or "test").

    All of a user's history counts as seen. Collective over the model's ranks: users
    are spread over the data-parallel ranks, and the ranks of a tensor-parallel group
    work on the same ones; every rank returns all users' predictions. Raises UserError
    with the model's name where a score is not finite.
    """
    [predictions] = evaluate_treatments(
        model, dataset, [exclude_seen], users=users, split=split, progress=progress
    )
    return predictions


def evaluate_treatments(
    model: ModelRanker,
    dataset: InteractionDataset,
    treatments: Sequence[bool],
    *,
    users: np.ndarray,
    split: str,
    progress: RankingProgress | None = None,
) -> list[Predictions]:
    """`evaluate_model` for each exclude_seen of `treatments`; the model reads once."""
    users = np.asarray(users, np.int64)
    targets = dataset.targets(split, users).astype(np.int64)
    histories = history_ranges(dataset, users, split)

    def rank(rows: np.ndarray) -> list[Predictions]:
        read = model.read(histories, rows)
        return [
            _beam_predictions(
                users[rows],
                targets[rows],
                model.rank_batch(histories, rows, read, top=model.beam, exclude_seen=exclude),
                exclude,
            )
            for exclude in treatments
        ]

    parts = model.over_batches(histories, rank, progress)
    return [concatenate_predictions(of_treatment) for of_treatment in zip(*parts, strict=True)]


def history_ranges(dataset: InteractionDataset, users: np.ndarray, split: str) -> HistoryRanges:
    """What `split` may see of each user's interactions."""
    return HistoryRanges(dataset.items, dataset.offsets[users], dataset.history_stop(split, users))


def baseline_predictions(
    name: str,
    inputs: BaselineInputs,
    *,
    users: np.ndarray,
    exclude_seen: bool,
    progress: RankingProgress | None = None,
) -> Predictions:
    """One of BASELINES by full ranking over the catalogue.

    `sasrec` needs the folder of the CF stage, `bayes` that of prepared synthetic data,
    a sequence model its own in `inputs.trained`; ValueError where it is missing.
    """
    return rank_all(
        BASELINES[name].make_scorer(inputs),
        inputs.dataset,
        log_p=BASELINES[name].log_p,
        users=users,
        split=inputs.split,
        exclude_seen=exclude_seen,
        name=name,
        progress=progress,
    )


def rank_all(
    score: Scorer,
    dataset: InteractionDataset,
    *,
    log_p: LogP,
    users: np.ndarray,
    split: str,
    exclude_seen: bool,
    name: str = "the model",
    progress: RankingProgress | None = None,
) -> Predictions:
    """Predictions of anything that scores every item, a chunk of users at a time.

    Kept are the top KEPT_ITEMS items, equal scores in item-id order, and the target's
    ties in the full ranking; the lists' scores are log p over all items, seen ones too.
    Raises UserError with `name` where a score is not finite.
    """
    users = np.asarray(users, np.int64)
    parts, done = [], 0
    for batch in _chunks(users, _chunk_users(dataset.num_items)):
        # A copy, since excluded items are overwritten below.
        scores = np.array(score(batch))
        if not np.isfinite(scores).all():
            raise UserError(
                f"{name}: its scores are not finite (NaN or infinite), so its training has "
                "diverged; lower its learning rate and train it again"
            )
        all_log_p = log_p(scores)
        if exclude_seen:
            seen = history_ranges(dataset, batch, split).seen(np.arange(len(batch)))
            scores[seen.rows, seen.items] = -np.inf
        targets = dataset.targets(split, batch).astype(np.int64)
        ranks = ranks_of_scores(scores, targets)
        items = top_items(scores, KEPT_ITEMS)
        kept = listed_log_p(items, scores, all_log_p)
        parts.append(
            Predictions(batch, targets, items, kept, ranks.first, ranks.tied, exclude_seen)
        )
        done += len(batch)
        if progress is not None:
            progress(done, len(users))
    return concatenate_predictions(parts)


def users_of_rank(users: np.ndarray, num_items: int, rank: int, world_size: int) -> np.ndarray:
    """The users that one of several processes hands to `rank_all`; none where there are
    more processes than chunks.

    Whole chunks, so that a model's products have the shapes, and the scores the bits,
    that they have in one process.
    """
    size = _chunk_users(num_items)
    chunks = -(-len(users) // size)
    first, stop = chunks * rank // world_size, chunks * (rank + 1) // world_size
    return users[first * size : stop * size]


def _chunk_users(num_items: int) -> int:
    """Users that a full ranking scores at once."""
    return max(1, CHUNK_SCORES // num_items)


def top_items(scores: np.ndarray, k: int) -> np.ndarray:
    """int32 [n, k]: the k best items of each row of scores [n, num_items], equal ones
    in item order; items that score -inf are -1.
    """
    k = min(k, scores.shape[1])
    kth_value = torch.from_numpy(scores).topk(k, dim=1).values[:, -1].numpy()
    # Candidates in ascending item order, so that of those equal to the k-th value the first stay.
    row, item = np.nonzero(scores >= kth_value[:, None])
    at_kth = scores[row, item] == kth_value[row]
    above = np.bincount(row[~at_kth], minlength=len(scores))
    row_start = np.searchsorted(row, np.arange(len(scores)))
    ordinal = np.cumsum(at_kth)
    ordinal -= (ordinal - at_kth)[row_start][row]
    items = item[~at_kth | (ordinal <= (k - above)[row])].reshape(-1, k)
    top = np.take_along_axis(scores, items, axis=1)
    order = np.argsort(-top, axis=1, kind="stable")
    items, top = np.take_along_axis(items, order, axis=1), np.take_along_axis(top, order, axis=1)
    return np.where(np.isneginf(top), -1, items).astype(np.int32)


def _beam_predictions(
    users: np.ndarray, targets: np.ndarray, ranked: RankedItems, exclude_seen: bool
) -> Predictions:
    """Beams as predictions: the items of one
    beam share a code tuple, and so are tied.
    """
    hit = ranked.items == targets[:, None]
    # -2 is neither a beam nor padding.
    beam = np.where(hit.any(axis=1), (ranked.beam * hit).sum(axis=1), -2)
    tied = ranked.beam == beam[:, None]
    return Predictions(
        users,
        targets,
        ranked.items,
        ranked.scores,
        first_column(tied),
        np.maximum(tied.sum(axis=1), 1),
        exclude_seen,
    )


def _chunks(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (array[start : start + size] for start in range(0, len(array), size))
