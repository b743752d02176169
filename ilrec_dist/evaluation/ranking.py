"""Evaluation over users: a trained model by constrained beam search, and the baselines by full ranking, with one metric code (METHOD.md §9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.evaluation.baselines.counting import (
    count_training,
    popularity_scores,
    transition_scores,
)
from ilrec_dist.evaluation.config import EvaluationConfig
from ilrec_dist.evaluation.metrics import UNRANKED, ranks_of_scores
from ilrec_dist.evaluation.predictions import Predictions, join
from ilrec_dist.inference.beam_search import RankedItems, SoftmaxScope, TrieConstraint
from ilrec_dist.inference.ranker import Histories, Progress, rank_histories
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.gpt import Backbone

BASELINES = ("popularity", "transitions", "sasrec", "bayes")
LISTED = 20  # items that a baseline's predictions keep
SCORES_AT_ONCE = 1 << 22

Scorer = Callable[[np.ndarray], np.ndarray]  # users int64 [n] → scores float [n, num_items]


def evaluate_model(
    backbone: Backbone,
    dataset: InteractionDataset,
    catalogue: Catalogue,
    trie: Trie,
    *,
    users: np.ndarray,
    split: str,
    config: EvaluationConfig,
    softmax_scope: SoftmaxScope,
    max_history: int,
    parallel: ParallelState,
    progress: Progress | None = None,
) -> Predictions:
    """Beam search for `users` (distinct, int [n]) on `split` ("validation" or "test"); returns all users' predictions on every rank.

    The input is the last `max_history` items of the history, all of which counts as seen. Collective over `parallel`: users are dealt over
    the data-parallel ranks, and the ranks of a tensor-parallel group work on the same ones.
    """
    users = np.asarray(users, np.int64)
    found = rank_histories(
        backbone,
        TrieConstraint(trie, parallel.device),
        Histories(dataset.items, dataset.offsets[users], dataset.history_stop(split, users)),
        beam=config.beam,
        batch_size=config.batch_size,
        softmax_scope=softmax_scope,
        max_history=max_history,
        exclude_seen=config.exclude_seen,
        parallel=parallel,
        progress=progress,
    )
    targets = dataset.targets(split, users).astype(np.int64)
    return join(
        [
            _predictions(users[rows], targets[rows], ranked, config.exclude_seen)
            for rows, ranked in found
        ]
    )


def baseline_predictions(
    method: str,
    dataset: InteractionDataset,
    *,
    users: np.ndarray,
    split: str,
    exclude_seen: bool,
    cf_folder: str | Path | None = None,
    data_folder: str | Path | None = None,
) -> Predictions:
    """One of BASELINES by full ranking over the catalogue. `sasrec` needs cf_folder, `bayes` the synthetic data's prepared data_folder."""
    return rank_all(
        _scorer(method, dataset, split, cf_folder, data_folder),
        dataset,
        users=users,
        split=split,
        exclude_seen=exclude_seen,
    )


def rank_all(
    score: Scorer,
    dataset: InteractionDataset,
    *,
    users: np.ndarray,
    split: str,
    exclude_seen: bool,
) -> Predictions:
    """Predictions of anything that scores every item: the top LISTED items, equal scores in item-id order, and the target's ties in the full ranking."""
    users = np.asarray(users, np.int64)
    parts = []
    for batch in _slices(users, max(1, SCORES_AT_ONCE // dataset.num_items)):
        scores = np.array(score(batch))  # a copy: what is seen is struck out below
        if exclude_seen:
            seen = Histories(
                dataset.items, dataset.offsets[batch], dataset.history_stop(split, batch)
            ).seen(np.arange(len(batch)))
            scores[seen.rows, seen.items] = -np.inf
        targets = dataset.targets(split, batch).astype(np.int64)
        ranks = ranks_of_scores(scores, targets)
        items, top = top_items(scores, LISTED)
        parts.append(Predictions(batch, targets, items, top, ranks.first, ranks.tied, exclude_seen))
    return join(parts)


def top_items(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of scores [n, I] per row, equal ones in item order: (items int32 [n, k], scores float32 [n, k]); -1 in place of items that score -inf."""
    k = min(k, scores.shape[1])
    edge = torch.from_numpy(scores).topk(k, dim=1).values[:, -1].numpy()
    row, item = np.nonzero(
        scores >= edge[:, None]
    )  # ascending: of the items at the edge, the first ones stay
    at_edge = scores[row, item] == edge[row]
    above = np.bincount(row[~at_edge], minlength=len(scores))
    row_start = np.searchsorted(row, np.arange(len(scores)))
    ordinal = np.cumsum(at_edge)
    ordinal -= (ordinal - at_edge)[row_start][row]
    items = item[~at_edge | (ordinal <= (k - above)[row])].reshape(-1, k)
    top = np.take_along_axis(scores, items, axis=1)
    order = np.argsort(-top, axis=1, kind="stable")
    items, top = np.take_along_axis(items, order, axis=1), np.take_along_axis(top, order, axis=1)
    return np.where(np.isneginf(top), -1, items).astype(np.int32), top.astype(np.float32)


def _scorer(
    method: str,
    dataset: InteractionDataset,
    split: str,
    cf_folder: str | Path | None,
    data_folder: str | Path | None,
) -> Scorer:
    if method in ("popularity", "transitions"):
        counts = count_training(dataset)
        if method == "popularity":
            return lambda users: popularity_scores(counts, users)
        return lambda users: transition_scores(counts, dataset, users, split)
    if method == "sasrec" and cf_folder is not None:
        from ilrec_dist.cf.sasrec.checkpoint import load_cf
        from ilrec_dist.cf.sasrec.scoring import sasrec_scores

        model = load_cf(cf_folder)
        return lambda users: sasrec_scores(model, dataset, users, split)
    if method == "bayes" and data_folder is not None:
        from ilrec_dist.data.synthetic.generate import bayes_scores

        return lambda users: bayes_scores(data_folder, dataset, users, split)
    raise ValueError(
        f"baseline {method!r}: expected one of {BASELINES}, sasrec with cf_folder and bayes with data_folder"
    )


def _predictions(
    users: np.ndarray, targets: np.ndarray, ranked: RankedItems, exclude_seen: bool
) -> Predictions:
    hit = ranked.items == targets[:, None]
    found = hit.any(axis=1)
    beam = np.where(found, (ranked.beam * hit).sum(axis=1), -2)  # -2: no beam, nor padding
    same = ranked.beam == beam[:, None]
    tie_start = (
        np.where(found, same.argmax(axis=1), UNRANKED)
        if ranked.items.shape[1]
        else np.full(len(users), UNRANKED)
    )
    return Predictions(
        users,
        targets,
        ranked.items,
        ranked.scores,
        tie_start,
        np.maximum(same.sum(axis=1), 1),
        exclude_seen,
    )


def _slices(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (array[start : start + size] for start in range(0, len(array), size))
