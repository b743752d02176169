"""Candidates of a fusion and their scores by
every source, for many histories (METHOD.md §12).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ilrec_dist.cf.sasrec.model import SASRec
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.evaluation.baselines.counting import TrainingCounts, history_transition_scores
from ilrec_dist.evaluation.baselines.sasrec import history_sasrec_scores
from ilrec_dist.evaluation.fusion import (
    FusionScores,
    are_listed,
    candidate_union,
    choose_weights,
    fused_scores,
    ranks_of_fused,
)
from ilrec_dist.evaluation.log_probabilities import (
    listed_log_p,
    log_of_counts,
    log_softmax,
)
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.evaluation.ranking import KEPT_ITEMS, history_ranges, top_items
from ilrec_dist.inference.beam_search import RankedItems
from ilrec_dist.inference.inputs import HistoryRanges
from ilrec_dist.inference.item_scores import score_items
from ilrec_dist.inference.ranker import ModelRanker, RankingProgress

# Histories whose candidates are in memory at once.
CHUNK_HISTORIES = 1 << 14


@dataclass(frozen=True)
class FusionSource:
    """What knows items besides the language model."""

    name: str
    # Maps histories and some of their rows int64 [n] to log p float64 [n, num_items].
    log_p: Callable[[HistoryRanges, np.ndarray], np.ndarray]


def cf_source(model: SASRec) -> FusionSource:
    """The CF model of all training users."""

    def log_p(histories: HistoryRanges, rows: np.ndarray) -> np.ndarray:
        start, stop = histories.start[rows], histories.stop[rows]
        return log_softmax(history_sasrec_scores(model, histories.items, start, stop))

    return FusionSource("cf", log_p)


def transitions_source(counts: TrainingCounts) -> FusionSource:
    """The counting of transitions in training."""

    def log_p(histories: HistoryRanges, rows: np.ndarray) -> np.ndarray:
        start, stop = histories.start[rows], histories.stop[rows]
        return log_of_counts(history_transition_scores(counts, histories.items, start, stop))

    return FusionSource("transitions", log_p)


def score_candidates(
    model: ModelRanker,
    histories: HistoryRanges,
    sources: Sequence[FusionSource],
    *,
    top: int,
    num_candidates: int,
    treatments: Sequence[bool],
    allowed: np.ndarray | None = None,
    progress: RankingProgress | None = None,
) -> list[FusionScores]:
    """For each exclude_seen of `treatments` the candidates of n
    histories with log p of the language model, then of the `sources`.

    Candidates are the items of the model's beams, of which there are `top` at least,
    and the top `num_candidates` of each source, without the items of the history where
    exclude_seen, and of `allowed`, bool [num_items], alone. Those of all treatments are
    scored together. Collective over the model's ranks; the same on every rank, and so
    is a UserError.
    """
    parallel = model.parallel

    def score(rows: np.ndarray) -> tuple[np.ndarray, list[FusionScores]]:
        read = model.read(histories, rows)
        by_source = [source.log_p(histories, rows) for source in sources]
        proposals = []
        for exclude_seen in treatments:
            ranked = model.rank_batch(
                histories, rows, read, top=top, exclude_seen=exclude_seen, allowed=allowed
            )
            seen = histories.seen(rows) if exclude_seen else None
            lists = [ranked.items]
            for log_p in by_source:
                left = log_p.copy()
                if seen is not None:
                    left[seen.rows, seen.items] = -np.inf
                if allowed is not None:
                    left[:, ~allowed] = -np.inf
                lists.append(top_items(left, num_candidates))
            proposals.append(lists)
        items = candidate_union(list(itertools.chain.from_iterable(proposals)))
        by_model = score_items(
            model.backbone,
            model.constraint,
            read,
            torch.from_numpy(items).to(parallel.device),
            vocab_size=model.trie.catalogue.vocab_size,
            softmax_scope=model.softmax_scope,
            tp_group=parallel.tp_group,
            model_name=model.model_name,
        )
        columns = [by_model.double().cpu().numpy()]
        columns += [np.take_along_axis(log_p, np.maximum(items, 0), axis=1) for log_p in by_source]
        scores = np.where(items[..., None] >= 0, np.stack(columns, axis=2), -np.inf)
        return rows, [
            FusionScores(
                items,
                scores,
                np.stack([are_listed(items, proposal) for proposal in lists], axis=2),
            ).of(range(1 + len(sources)))
            for lists in proposals
        ]

    rows, by_treatment = zip(*model.over_batches(histories, score, progress), strict=True)
    return [
        _joined(len(histories.start), list(zip(rows, scores, strict=True)))
        for scores in zip(*by_treatment, strict=True)
    ]


def _joined(count: int, parts: Sequence[tuple[np.ndarray, FusionScores]]) -> FusionScores:
    """Those of all `count` histories, from some rows and their candidates each."""
    num_sources = parts[0][1].log_p.shape[2]
    shape = count, max(part.items.shape[1] for _, part in parts)
    items = np.full(shape, -1, np.int64)
    log_p = np.full((*shape, num_sources), -np.inf)
    proposed = np.zeros((*shape, num_sources), np.bool_)
    for rows, part in parts:
        width = part.items.shape[1]
        items[rows, :width] = part.items
        log_p[rows, :width] = part.log_p
        proposed[rows, :width] = part.proposed
    return FusionScores(items, log_p, proposed)


@dataclass(frozen=True)
class Mixture:
    """What is mixed, and whether items of the history are left out."""

    exclude_seen: bool
    # 0 is the language model, 1 the first source.
    parts: Sequence[int]


@dataclass(frozen=True)
class Fusions:
    """Mixtures of a language model with some of the same sources, one or several.

    What it does is collective over the model's ranks, and the same on every rank.
    """

    model: ModelRanker
    dataset: InteractionDataset
    sources: Sequence[FusionSource]
    mixtures: Sequence[Mixture]
    num_candidates: int

    def choose_weights(
        self, users: np.ndarray, progress: RankingProgress | None = None
    ) -> list[tuple[np.ndarray, float]]:
        """The weights of each by the validation split of
        these users, float64 [its parts], and the NDCG@10 there.
        """
        targets = self.dataset.targets("validation", users).astype(np.int64)
        scores = self.scores(users, "validation", progress)
        return [choose_weights(of_mixture, targets) for of_mixture in scores]

    def predictions(
        self,
        weights: Sequence[np.ndarray],
        *,
        users: np.ndarray,
        progress: RankingProgress | None = None,
    ) -> list[Predictions]:
        """Rank the test split of these users, ascending, by each mixture."""
        targets = self.dataset.targets("test", users).astype(np.int64)
        scores = self.scores(users, "test", progress)
        return [
            fused_predictions(
                of_mixture, alpha, users=users, targets=targets, exclude_seen=mixture.exclude_seen
            )
            for mixture, of_mixture, alpha in zip(self.mixtures, scores, weights, strict=True)
        ]

    def scores(
        self, users: np.ndarray, split: str, progress: RankingProgress | None = None
    ) -> Iterator[FusionScores]:
        """The candidates of each mixture and their scores, one after the other."""
        treatments = list(dict.fromkeys(mixture.exclude_seen for mixture in self.mixtures))
        scores = score_candidates(
            self.model,
            history_ranges(self.dataset, users, split),
            self.sources,
            top=self.model.beam,
            num_candidates=self.num_candidates,
            treatments=treatments,
            progress=progress,
        )
        of_treatment = dict(zip(treatments, scores, strict=True))
        return (of_treatment[mixture.exclude_seen].of(mixture.parts) for mixture in self.mixtures)


def fused_predictions(
    scores: FusionScores,
    weights: np.ndarray,
    *,
    users: np.ndarray,
    targets: np.ndarray,
    exclude_seen: bool,
) -> Predictions:
    """The best KEPT_ITEMS candidates of each user,
    ascending by user; equal ones in item order.
    """
    items, best = fused_lists(scores, weights, KEPT_ITEMS)
    ranks = ranks_of_fused(scores, weights, targets)
    return Predictions(
        users,
        targets,
        items,
        best,
        ranks.first,
        ranks.tied,
        exclude_seen,
    )


def fused_lists(
    scores: FusionScores, weights: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best candidates of each history, equal ones in item order.

    Returns (items int32 [n, top or fewer] padded with -1, log p float32 over
    all candidates of the history, padded with -inf).
    """
    fused = fused_scores(scores, weights)
    columns = top_items(fused, top)
    items = np.take_along_axis(scores.items, np.maximum(columns, 0), axis=1)
    # A history without candidates has nothing to normalise.
    has_candidates = (columns >= 0).any(axis=1, keepdims=True)
    log_p = log_softmax(np.where(has_candidates, fused, 0.0))
    return (
        np.where(columns >= 0, items, -1).astype(np.int32),
        listed_log_p(columns, fused, log_p),
    )


@dataclass(frozen=True)
class FusedRanker:
    """A `Ranker` by the mixture of a language model and other sources."""

    model: ModelRanker
    sources: Sequence[FusionSource]
    # By exclude_seen: float64 [1 + sources], the language model's weight first.
    weights: Mapping[bool, np.ndarray]
    # Items of each source that are candidates, or `top` where that is more.
    num_candidates: int

    def rank(
        self,
        histories: HistoryRanges,
        *,
        top: int,
        exclude_seen: bool,
        allowed: np.ndarray | None = None,
        progress: RankingProgress | None = None,
    ) -> list[tuple[np.ndarray, RankedItems]]:
        """As the protocol has it."""
        ranked, total = [], len(histories.start)
        # The candidates of all histories would take kilobytes each.
        for first in range(0, total, CHUNK_HISTORIES):
            rows = np.arange(first, min(first + CHUNK_HISTORIES, total))
            part = HistoryRanges(histories.items, histories.start[rows], histories.stop[rows])
            ranked.append((rows, self._rank(part, top, exclude_seen, allowed)))
            if progress is not None:
                progress(int(rows[-1]) + 1, total)
        return ranked

    def _rank(
        self, histories: HistoryRanges, top: int, exclude_seen: bool, allowed: np.ndarray | None
    ) -> RankedItems:
        [scores] = score_candidates(
            self.model,
            histories,
            self.sources,
            top=top,
            num_candidates=max(self.num_candidates, top),
            treatments=[exclude_seen],
            allowed=allowed,
        )
        items, best = fused_lists(scores, self.weights[exclude_seen], top)
        # Every item stands for itself.
        alone = np.where(items >= 0, np.arange(items.shape[1], dtype=np.int32), -1)
        return RankedItems(items, best, alone.astype(np.int32))
