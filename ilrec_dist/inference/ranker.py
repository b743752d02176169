"""Ranked items for many histories: batches of
like lengths, spread over data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ilrec_dist.distributed.layout import ParallelState, over_data_parallel
from ilrec_dist.inference.beam_search import Decoder, RankedItems, beam_search, expand_beams
from ilrec_dist.inference.inputs import HistoryRanges, InputForm
from ilrec_dist.inference.parallel_head import SoftmaxScope
from ilrec_dist.inference.trie_constraint import TrieConstraint
from ilrec_dist.items.trie import Trie

# Called with (histories ranked, histories in all) of this data-parallel rank.
RankingProgress = Callable[[int, int], Any]


def rank_histories(
    backbone: Decoder,
    constraint: TrieConstraint,
    histories: HistoryRanges,
    *,
    beam: int,
    batch_size: int,
    softmax_scope: SoftmaxScope,
    inputs: InputForm,
    exclude_seen: bool,
    parallel: ParallelState,
    progress: RankingProgress | None = None,
    model_name: str = "the model",
) -> list[tuple[np.ndarray, RankedItems]]:
    """(rows of `histories`, their ranked items),
    every row once; the same list on every rank.

    `inputs` makes the model's input of them; with exclude_seen no item of the whole
    history is returned, and a row with nothing left has an empty list. Collective over
    `parallel`: the ranks of a tensor-parallel group work on the same histories. The
    backbone is in eval mode meanwhile. Raises UserError with `model_name` where a score
    is not finite, on every rank.
    """
    catalogue = constraint.trie.catalogue
    batches = inputs.batches(histories, batch_size)[parallel.dp_rank :: parallel.dp]
    total = sum(map(len, batches))

    def rank_own() -> list[tuple[np.ndarray, RankedItems]]:
        ranked: list[tuple[np.ndarray, RankedItems]] = []
        done = 0
        for rows in batches:
            prefixes = inputs.prefixes(histories, rows).to(parallel.device)
            excluded = histories.seen(rows) if exclude_seen else None
            beams = beam_search(
                backbone,
                constraint,
                prefixes,
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
        return ranked

    was_training = backbone.training
    backbone.eval()
    ranked = over_data_parallel(parallel, rank_own)
    backbone.train(was_training)
    return ranked


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

    def _narrowed(self, allowed: np.ndarray) -> TrieConstraint:
        """The constraint to the allowed items, made once where the same come again."""
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
        """As the protocol has it."""
        return rank_histories(
            self.backbone,
            self.constraint if allowed is None else self._narrowed(allowed),
            histories,
            beam=max(self.beam, top),
            batch_size=self.batch_size,
            softmax_scope=self.softmax_scope,
            inputs=self.inputs,
            exclude_seen=exclude_seen,
            parallel=self.parallel,
            progress=progress,
            model_name=self.model_name,
        )
