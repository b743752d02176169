"""Ranked items for many histories: batches of equal lengths, spread over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.data.dataset import ItemArray
from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.inference.beam_search import RankedItems, beam_search, expand_beams
from ilrec_dist.inference.parallel_head import SoftmaxScope
from ilrec_dist.inference.trie_constraint import ItemSets, TrieConstraint
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.gpt import Backbone

# Called with (histories ranked, histories in all) of this data-parallel rank.
RankingProgress = Callable[[int, int], Any]

# Histories whose tokens are counted at once, so that no array of all interactions is made.
CHUNK_HISTORIES = 100_000


@dataclass(frozen=True)
class HistoryRanges:
    """n histories as ranges of one array of item indices, oldest first.

    History r is items[start[r] : stop[r]] and never empty.
    """

    items: ItemArray  # int [T]
    start: np.ndarray  # int64 [n]
    stop: np.ndarray  # int64 [n]

    def seen(self, rows: np.ndarray) -> ItemSets:
        """The items of each row's whole history."""
        return ItemSets.of([self.items[self.start[row] : self.stop[row]] for row in rows])

    def input_tokens(self, rows: np.ndarray, max_history: int, catalogue: Catalogue) -> np.ndarray:
        """int64 [n, S] tokens of the rows' last max_history items.

        The rows must have equally many tokens, as those of one batch of `batches` have.
        """
        count = np.minimum(self.stop[rows] - self.start[rows], max_history)
        items = self.items[ragged_ranges(self.stop[rows] - count, count)]
        real = np.arange(catalogue.depth) < catalogue.item_lengths(items)[:, None]
        return catalogue.item_tokens(items)[real].reshape(len(rows), -1).astype(np.int64)

    def batches(self, max_history: int, size: int, catalogue: Catalogue) -> list[np.ndarray]:
        """Rows (int64, at most `size` each) whose inputs have equally many tokens.

        Long ones come first, so that the largest batch is met at once and a short one ends the
        work. Raises ValueError for an empty history or none at all.
        """
        count = np.minimum(self.stop - self.start, max_history)
        if len(count) == 0 or count.min() < 1:
            raise ValueError("expected histories of at least one item each")
        lengths = count * catalogue.depth
        if catalogue.pieces is not None:
            for low in range(0, len(count), CHUNK_HISTORIES):
                part = slice(low, low + CHUNK_HISTORIES)
                items = self.items[ragged_ranges(self.stop[part] - count[part], count[part])]
                first = np.cumsum(count[part]) - count[part]
                lengths[part] = np.add.reduceat(catalogue.item_lengths(items), first)
        batches = []
        for length in np.unique(lengths)[::-1]:
            rows = np.flatnonzero(lengths == length)
            batches += [rows[first : first + size] for first in range(0, len(rows), size)]
        return batches


def rank_histories(
    backbone: Backbone,
    constraint: TrieConstraint,
    histories: HistoryRanges,
    *,
    beam: int,
    batch_size: int,
    softmax_scope: SoftmaxScope,
    max_history: int,
    exclude_seen: bool,
    parallel: ParallelState,
    progress: RankingProgress | None = None,
    model_name: str = "the model",
) -> list[tuple[np.ndarray, RankedItems]]:
    """(rows of `histories`, their ranked items), every row once; the same list on every rank.

    The input is the last `max_history` items; with exclude_seen no item of the whole history is
    returned, and a row with nothing left has an empty list. Collective over `parallel`: the ranks
    of a tensor-parallel group work on the same histories. The backbone is in eval mode meanwhile.
    Raises UserError with `model_name` where a score is not finite.
    """
    catalogue = constraint.trie.catalogue
    batches = histories.batches(max_history, batch_size, catalogue)[parallel.dp_rank :: parallel.dp]
    ranked: list[tuple[np.ndarray, RankedItems]] = []
    done, total = 0, sum(map(len, batches))
    was_training = backbone.training
    backbone.eval()
    for rows in batches:
        tokens = torch.from_numpy(histories.input_tokens(rows, max_history, catalogue))
        excluded = histories.seen(rows) if exclude_seen else None
        beams = beam_search(
            backbone,
            constraint,
            tokens.to(parallel.device),
            vocab_size=catalogue.vocab_size,
            beam=beam,
            softmax_scope=softmax_scope,
            excluded=excluded,
            tp_group=parallel.tp_group,
            model_name=model_name,
        )
        ranked.append((rows, expand_beams(constraint, beams, excluded)))
        done += len(rows)
        if progress is not None:
            progress(done, total)
    backbone.train(was_training)
    if parallel.dp > 1:
        gathered: list[list[tuple[np.ndarray, RankedItems]]] = [[] for _ in range(parallel.dp)]
        dist.all_gather_object(gathered, ranked, group=parallel.dp_group)
        ranked = [part for rank in gathered for part in rank]
    return ranked


class Ranker(Protocol):
    """Makes lists for histories, with all that this needs: a model, or several sources."""

    def rank(
        self,
        histories: HistoryRanges,
        *,
        top: int,
        exclude_seen: bool,
        allowed: np.ndarray | None = None,
        progress: RankingProgress | None = None,
    ) -> list[tuple[np.ndarray, RankedItems]]:
        """(rows of `histories`, their lists of at least `top` items), every row once.

        A list is shorter where fewer items are left. With exclude_seen no item of the history is
        listed; with `allowed`, bool [num_items], no other item. Raises UserError where a score is
        not finite.
        """


@dataclass(frozen=True)
class ModelRanker:
    """Beam search with one model; collective over `parallel`."""

    backbone: Backbone
    trie: Trie
    # Beams that are kept, or `top` where that is more.
    beam: int
    # Histories whose beams are searched together.
    batch_size: int
    softmax_scope: SoftmaxScope
    # Items of a history that the model reads.
    max_history: int
    parallel: ParallelState
    # Errors name the model so.
    model_name: str = "the model"

    @cached_property
    def constraint(self) -> TrieConstraint:
        """The whole catalogue's."""
        return TrieConstraint(self.trie, self.parallel.device)

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
        constraint = self.constraint
        if allowed is not None:
            constraint = TrieConstraint(self.trie, self.parallel.device, allowed)
        return rank_histories(
            self.backbone,
            constraint,
            histories,
            beam=max(self.beam, top),
            batch_size=self.batch_size,
            softmax_scope=self.softmax_scope,
            max_history=self.max_history,
            exclude_seen=exclude_seen,
            parallel=self.parallel,
            progress=progress,
            model_name=self.model_name,
        )
