"""Ranked items for many histories: batches of
like lengths, spread over data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np

from ilrec_dist.distributed.layout import ParallelState, over_data_parallel
from ilrec_dist.inference.beam_search import (
    Decoder,
    RankedItems,
    ReadPrefixes,
    beam_search,
    expand_beams,
    read_prefixes,
)
from ilrec_dist.inference.inputs import HistoryRanges, InputForm
from ilrec_dist.inference.parallel_head import SoftmaxScope
from ilrec_dist.inference.trie_constraint import TrieConstraint
from ilrec_dist.items.trie import Trie

# Called with (histories ranked, histories in all) of this data-parallel rank.
RankingProgress = Callable[[int, int], Any]
T = TypeVar("T")


class Ranker(Protocol):
    """Makes lists for histories, with all that
    this needs: a model, or several sources.
    """

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

        A list is shorter where fewer items are left. With exclude_seen no
        item of the history is listed; with `allowed`, bool [num_items],
        no other item. Raises UserError where a score is not finite.
        """


@dataclass(frozen=True)
class ModelRanker:
    """Beam search with one model; collective over `parallel`."""

    backbone: Decoder
    trie: Trie
    # Beams that are kept, or `top` where that is more.
    beam: int
    # Histories whose beams are searched together.
    batch_size: int
    softmax_scope: SoftmaxScope
    # What the model reads of a history.
    inputs: InputForm
    parallel: ParallelState
    # Errors name the model so.
    model_name: str = "the model"

    @cached_property
    def constraint(self) -> TrieConstraint:
        """The whole catalogue's."""
        return TrieConstraint(self.trie, self.parallel.device)

    @cached_property
    def _constraints(self) -> dict[bytes, TrieConstraint]:
        """The last mask of allowed items, packed, and what was made of it."""
        return {}

    def constraint_to(self, allowed: np.ndarray | None) -> TrieConstraint:
        """The constraint to the allowed items, bool [num_items],
        made once where the same come again; None allows all.
        """
        if allowed is None:
            return self.constraint
        key = np.packbits(allowed).tobytes()
        if key not in self._constraints:
            self._constraints.clear()
            self._constraints[key] = TrieConstraint(self.trie, self.parallel.device, allowed)
        return self._constraints[key]

    def rank(
        self,
        histories: HistoryRanges,
        *,
        top: int,
        exclude_seen: bool,
        allowed: np.ndarray | None = None,
        progress: RankingProgress | None = None,
    ) -> list[tuple[np.ndarray, RankedItems]]:
        """As the protocol has it. Collective over `parallel`: the ranks of a
        tensor-parallel group work on the same histories, and all have the same list.
        """

        def rank(rows: np.ndarray) -> tuple[np.ndarray, RankedItems]:
            read = self.read(histories, rows)
            return rows, self.rank_batch(
                histories, rows, read, top=top, exclude_seen=exclude_seen, allowed=allowed
            )

        return self.over_batches(histories, rank, progress)

    def read(self, histories: HistoryRanges, rows: np.ndarray) -> ReadPrefixes:
        """What the model has read of the rows of one batch."""
        return read_prefixes(
            self.backbone, self.inputs.prefixes(histories, rows).to(self.parallel.device)
        )

    def rank_batch(
        self,
        histories: HistoryRanges,
        rows: np.ndarray,
        read: ReadPrefixes,
        *,
        top: int,
        exclude_seen: bool,
        allowed: np.ndarray | None = None,
    ) -> RankedItems:
        """The lists of the rows of one batch; the backbone is expected in eval mode."""
        constraint = self.constraint_to(allowed)
        excluded = histories.seen(rows) if exclude_seen else None
        beams = beam_search(
            self.backbone,
            constraint,
            read,
            vocab_size=self.trie.catalogue.vocab_size,
            beam=max(self.beam, top),
            softmax_scope=self.softmax_scope,
            excluded=excluded,
            tp_group=self.parallel.tp_group,
            model_name=self.model_name,
        )
        return expand_beams(constraint, beams, excluded)

    def over_batches(
        self,
        histories: HistoryRanges,
        make: Callable[[np.ndarray], T],
        progress: RankingProgress | None = None,
    ) -> list[T]:
        """What `make` gives for the rows (int64) of each batch of the histories; the
        same list on every rank, and so is a UserError.

        Collective over `parallel`: the batches are spread over the data-parallel
        ranks. The backbone is in eval mode meanwhile.
        """
        parallel = self.parallel
        batches = self.inputs.batches(histories, self.batch_size)[parallel.dp_rank :: parallel.dp]
        total = sum(map(len, batches))

        def make_own() -> list[T]:
            made, done = [], 0
            for rows in batches:
                made.append(make(rows))
                done += len(rows)
                if progress is not None:
                    progress(done, total)
            return made

        was_training = self.backbone.training
        self.backbone.eval()
        made = over_data_parallel(parallel, make_own)
        self.backbone.train(was_training)
        return made
