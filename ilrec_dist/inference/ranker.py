"""Ranked items for many histories: batches of like lengths, spread over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist

from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.inference.beam_search import RankedItems, beam_search, expand_beams
from ilrec_dist.inference.inputs import HistoryRanges, InputForm
from ilrec_dist.inference.parallel_head import SoftmaxScope
from ilrec_dist.inference.trie_constraint import TrieConstraint
from ilrec_dist.model.gpt import Backbone

# Called with (histories ranked, histories in all) of this data-parallel rank.
RankingProgress = Callable[[int, int], Any]


def rank_histories(
    backbone: Backbone,
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
    """(rows of `histories`, their ranked items), every row once; the same list on every rank.

    `inputs` makes the model's input of them; with exclude_seen no item of the whole history is
    returned, and a row with nothing left has an empty list. Collective over `parallel`: the ranks
    of a tensor-parallel group work on the same histories. The backbone is in eval mode meanwhile.
    Raises UserError with `model_name` where a score is not finite.
    """
    catalogue = constraint.trie.catalogue
    batches = inputs.batches(histories, batch_size)[parallel.dp_rank :: parallel.dp]
    ranked: list[tuple[np.ndarray, RankedItems]] = []
    done, total = 0, sum(map(len, batches))
    was_training = backbone.training
    backbone.eval()
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
    backbone.train(was_training)
    if parallel.dp > 1:
        gathered: list[list[tuple[np.ndarray, RankedItems]]] = [[] for _ in range(parallel.dp)]
        dist.all_gather_object(gathered, ranked, group=parallel.dp_group)
        ranked = [part for rank in gathered for part in rank]
    return ranked
