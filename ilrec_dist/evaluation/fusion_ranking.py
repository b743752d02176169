"""Candidates of a fusion and their scores by
every source, for many histories (METHOD.md §12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ilrec_dist.cf.sasrec.model import SASRec
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.distributed.layout import ParallelState, over_data_parallel
from ilrec_dist.evaluation.baselines.counting import TrainingCounts, history_transition_scores
from ilrec_dist.evaluation.baselines.sasrec import history_sasrec_scores
from ilrec_dist.evaluation.config import EvaluationConfig
from ilrec_dist.evaluation.fusion import (
    FusionScores,
    candidate_union,
    choose_weights,
    fused_scores,
    log_of_counts,
    log_softmax,
    ranks_of_fused,
)
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.evaluation.ranking import (
    KEPT_ITEMS,
    evaluate_model,
    history_ranges,
    top_items,
)
from ilrec_dist.inference.beam_search import Decoder, RankedItems
from ilrec_dist.inference.inputs import HistoryRanges, InputForm
from ilrec_dist.inference.item_scores import score_items
from ilrec_dist.inference.parallel_head import SoftmaxScope
from ilrec_dist.inference.ranker import ModelRanker, RankingProgress
from ilrec_dist.inference.trie_constraint import TrieConstraint
from ilrec_dist.items.trie import Trie

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
    backbone: Decoder,
    constraint: TrieConstraint,
    histories: HistoryRanges,
    beam_items: np.ndarray,
    sources: Sequence[FusionSource],
    *,
    num_candidates: int,
    batch_size: int,
    softmax_scope: SoftmaxScope,
    inputs: InputForm,
    exclude_seen: bool,
    parallel: ParallelState,
    allowed: np.ndarray | None = None,
    model_name: str = "the model",
) -> FusionScores:
    """The candidates of n histories with log p
    of the language model, then of the `sources`.

    Candidates are the items of the beams, int [n, W] padded with -1, and the top
    `num_candidates` of each source, without the items of the history where
    exclude_seen, and of `allowed`, bool [num_items], alone. Collective over `parallel`;
    the same on every rank, and so is a UserError.
    """
    catalogue = constraint.trie.catalogue
    batches = inputs.batches(histories, batch_size)[parallel.dp_rank :: parallel.dp]

    def score_own() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        parts = []
        for rows in batches:
            by_source = [source.log_p(histories, rows) for source in sources]
            seen = histories.seen(rows) if exclude_seen else None
            lists = [beam_items[rows]]
            for log_p in by_source:
                ranked = log_p.copy()
                if seen is not None:
                    ranked[seen.rows, seen.items] = -np.inf
                if allowed is not None:
                    ranked[:, ~allowed] = -np.inf
                lists.append(top_items(ranked, num_candidates)[0])
            items = candidate_union(lists)
            by_model = score_items(
                backbone,
                constraint,
                inputs.prefixes(histories, rows).to(parallel.device),
                torch.from_numpy(items).to(parallel.device),
                vocab_size=catalogue.vocab_size,
                softmax_scope=softmax_scope,
                tp_group=parallel.tp_group,
                model_name=model_name,
            )
            columns = [by_model.double().cpu().numpy()]
            columns += [
                np.take_along_axis(log_p, np.maximum(items, 0), axis=1) for log_p in by_source
            ]
            scores = np.where(items[..., None] >= 0, np.stack(columns, axis=2), -np.inf)
            parts.append((rows, items, scores))
        return parts

    was_training = backbone.training
    backbone.eval()
    parts = over_data_parallel(parallel, score_own)
    backbone.train(was_training)
    width = max(items.shape[1] for _, items, _ in parts)
    union = np.full((len(beam_items), width), -1, np.int64)
    log_p = np.full((len(beam_items), width, 1 + len(sources)), -np.inf)
    for rows, items, scores in parts:
        union[rows, : items.shape[1]] = items
        log_p[rows, : items.shape[1]] = scores
    return FusionScores(union, log_p)


@dataclass(frozen=True)
class FusedModel:
    """A language model and the sources that it is mixed with.

    What it does is collective over `parallel`, and the same on every rank.
    """

    backbone: Decoder
    dataset: InteractionDataset
    trie: Trie
    sources: Sequence[FusionSource]
    config: EvaluationConfig
    softmax_scope: SoftmaxScope
    inputs: InputForm
    parallel: ParallelState
    model_name: str = "the model"

    @cached_property
    def constraint(self) -> TrieConstraint:
        return TrieConstraint(self.trie, self.parallel.device)

    def choose_weights(self, users: np.ndarray) -> tuple[np.ndarray, float]:
        """The weights by the validation split of these users, float64 [1 + sources]
        with the language model's first, and the NDCG@10 there.
        """
        scores, beams = self._scores(users, "validation")
        return choose_weights(scores, beams.targets)

    def predictions(
        self, weights: np.ndarray, *, users: np.ndarray, progress: RankingProgress | None = None
    ) -> Predictions:
        """Rank the test split of these users by the mixture with these weights."""
        scores, beams = self._scores(users, "test", progress)
        return fused_predictions(
            scores,
            weights,
            users=beams.users,
            targets=beams.targets,
            exclude_seen=self.config.exclude_seen,
        )

    def _scores(
        self, users: np.ndarray, split: str, progress: RankingProgress | None = None
    ) -> tuple[FusionScores, Predictions]:
        """The candidates and their scores, and the beams that some come from."""
        beams = evaluate_model(
            self.backbone,
            self.dataset,
            self.trie.catalogue,
            self.trie,
            users=users,
            split=split,
            config=self.config,
            softmax_scope=self.softmax_scope,
            inputs=self.inputs,
            parallel=self.parallel,
            progress=progress,
            model_name=self.model_name,
        )
        scores = score_candidates(
            self.backbone,
            self.constraint,
            history_ranges(self.dataset, beams.users, split),
            beams.items,
            self.sources,
            num_candidates=self.config.fusion_candidates,
            batch_size=self.config.batch_size,
            softmax_scope=self.softmax_scope,
            inputs=self.inputs,
            exclude_seen=self.config.exclude_seen,
            parallel=self.parallel,
            model_name=self.model_name,
        )
        return scores, beams


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

    Returns (items int32 [n, top or fewer] padded
    with -1, scores float32 padded with -inf).
    """
    columns, best = top_items(fused_scores(scores, weights), top)
    items = np.take_along_axis(scores.items, np.maximum(columns, 0), axis=1)
    return np.where(columns >= 0, items, -1).astype(np.int32), best


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
        model = self.model
        beams = model.rank(histories, top=top, exclude_seen=exclude_seen, allowed=allowed)
        width = max(part.items.shape[1] for _, part in beams)
        beam_items = np.full((len(histories.start), width), -1, np.int64)
        for rows, part in beams:
            beam_items[rows, : part.items.shape[1]] = part.items
        scores = score_candidates(
            model.backbone,
            model.constraint,
            histories,
            beam_items,
            self.sources,
            num_candidates=max(self.num_candidates, top),
            batch_size=model.batch_size,
            softmax_scope=model.softmax_scope,
            inputs=model.inputs,
            exclude_seen=exclude_seen,
            parallel=model.parallel,
            allowed=allowed,
            model_name=model.model_name,
        )
        items, best = fused_lists(scores, self.weights[exclude_seen], top)
        # Every item stands for itself.
        alone = np.where(items >= 0, np.arange(items.shape[1], dtype=np.int32), -1)
        return RankedItems(items, best, alone.astype(np.int32))
