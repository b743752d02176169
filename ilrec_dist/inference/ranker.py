"""Ranked items for many histories: batches of equally long inputs, dealt over the data-parallel ranks, through beam search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.data.dataset import ItemArray
from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.inference.beam_search import (
    ItemSets,
    RankedItems,
    SoftmaxScope,
    TrieConstraint,
    beam_search,
    expand,
)
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.model.gpt import Backbone

Progress = Callable[
    [int, int], Any
]  # (histories done, histories in all) on this data-parallel rank


@dataclass(frozen=True)
class Histories:
    """n histories as ranges of one array of item indices, oldest first: history r is items[start[r] : stop[r]], never empty."""

    items: ItemArray  # int [T]
    start: np.ndarray  # int64 [n]
    stop: np.ndarray  # int64 [n]

    def seen(self, rows: np.ndarray) -> ItemSets:
        return ItemSets.of([self.items[self.start[row] : self.stop[row]] for row in rows])

    def inputs(self, rows: np.ndarray, max_history: int, catalogue: Catalogue) -> np.ndarray:
        """int64 [n, S] tokens of the rows' last max_history items, which must have equally many (see batches)."""
        count = np.minimum(self.stop[rows] - self.start[rows], max_history)
        items = self.items[ragged_ranges(self.stop[rows] - count, count)]
        real = np.arange(catalogue.depth) < catalogue.item_lengths(items)[:, None]
        return catalogue.item_tokens(items)[real].reshape(len(rows), -1).astype(np.int64)

    def batches(self, max_history: int, size: int, catalogue: Catalogue) -> list[np.ndarray]:
        """Rows int64 with inputs of equally many tokens, long ones first, so that the largest batch is met at once and a short one ends the work."""
        count = np.minimum(self.stop - self.start, max_history)
        if len(count) == 0 or count.min() < 1:
            raise ValueError("expected histories of at least one item each")
        lengths = count * catalogue.depth
        if catalogue.pieces is not None:
            for low in range(
                0, len(count), 100_000
            ):  # histories at a time: nothing as long as all interactions is made
                part, stop = count[low : low + 100_000], self.stop[low : low + 100_000]
                tokens = catalogue.item_lengths(self.items[ragged_ranges(stop - part, part)])
                lengths[low : low + 100_000] = np.add.reduceat(tokens, np.cumsum(part) - part)
        found = []
        for length in np.unique(lengths)[::-1]:
            rows = np.flatnonzero(lengths == length)
            found += [rows[at : at + size] for at in range(0, len(rows), size)]
        return found


def rank_histories(
    backbone: Backbone,
    space: TrieConstraint,
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
    batches = histories.batches(max_history, batch_size, catalogue)[parallel.dp_rank :: parallel.dp]
    found: list[tuple[np.ndarray, RankedItems]] = []
    done, total = 0, sum(map(len, batches))
    was_training = backbone.training
    backbone.eval()
    for rows in batches:
        tokens = torch.from_numpy(histories.inputs(rows, max_history, catalogue)).to(
            parallel.device
        )
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
