"""Ranked items for many histories: batches of equally long inputs, dealt over the data-parallel ranks, through beam search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ilrec_dist.backbone.model import Backbone
from ilrec_dist.backbone.parallel import ParallelState
from ilrec_dist.evaluation.decoding import ItemSets, RankedItems, SearchSpace, SoftmaxScope, beam_search, expand

Progress = Callable[[int, int], Any]  # (histories done, histories in all) on this data-parallel rank


@dataclass(frozen=True)
class Histories:
    """n histories as ranges of one array of item indices, oldest first: history r is items[start[r] : stop[r]], never empty."""

    items: np.ndarray  # int [T]
    start: np.ndarray  # int64 [n]
    stop: np.ndarray  # int64 [n]

    def seen(self, rows: np.ndarray) -> ItemSets:
        return ItemSets.of([self.items[self.start[row] : self.stop[row]] for row in rows])

    def batches(self, max_history: int, size: int) -> list[tuple[int, np.ndarray]]:
        """(input length in items, rows int64), long inputs first, so that the largest batch is met at once and a short one ends the work."""
        lengths = np.minimum(self.stop - self.start, max_history)
        if len(lengths) == 0 or lengths.min() < 1:
            raise ValueError("expected histories of at least one item each")
        found = []
        for length in np.unique(lengths)[::-1]:
            rows = np.flatnonzero(lengths == length)
            found += [(int(length), rows[at : at + size]) for at in range(0, len(rows), size)]
        return found


def rank_histories(
    backbone: Backbone,
    space: SearchSpace,
    histories: Histories,
    *,
    beam: int,
    batch_size: int,
    softmax_scope: SoftmaxScope,
    max_history: int,
    exclude_seen: bool,
    parallel: ParallelState,
    progress: Progress | None = None,
) -> list[tuple[np.ndarray, RankedItems]]:
    """(rows of `histories`, their ranked items), every row once; the same list on every rank. Collective over `parallel`.

    The input is the last `max_history` items; with exclude_seen no item of the whole history is returned. The ranks of a tensor-parallel
    group work on the same histories. The backbone is in eval mode meanwhile.
    """
    catalogue = space.trie.catalogue
    batches = histories.batches(max_history, batch_size)[parallel.dp_rank :: parallel.dp]
    found: list[tuple[np.ndarray, RankedItems]] = []
    done, total = 0, sum(len(rows) for _, rows in batches)
    was_training = backbone.training
    backbone.eval()
    for length, rows in batches:
        context = histories.items[histories.stop[rows, None] + np.arange(-length, 0)]
        tokens = torch.from_numpy(catalogue.item_tokens(context).reshape(len(rows), -1).astype(np.int64)).to(parallel.device)
        excluded = histories.seen(rows) if exclude_seen else None
        beams = beam_search(
            backbone,
            space,
            tokens,
            vocab_size=catalogue.vocab_size,
            beam=beam,
            softmax_scope=softmax_scope,
            excluded=excluded,
            tp_group=parallel.tp_group,
        )
        found.append((rows, expand(space, beams, excluded)))
        done += len(rows)
        if progress is not None:
            progress(done, total)
    backbone.train(was_training)
    if parallel.dp > 1:
        gathered: list[list[tuple[np.ndarray, RankedItems]]] = [[] for _ in range(parallel.dp)]
        dist.all_gather_object(gathered, found, group=parallel.dp_group)
        found = [part for rank in gathered for part in rank]
    return found
