"""How often an intermediate layer's best continuation is the final layer's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.samples.collate import Batch

# Logits in memory at once.
CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def layer_agreement(backbone: Backbone, batch: Batch, parallel: ParallelState) -> dict[int, Tensor]:
    """bool [N] for the number of every layer under the
    final one: whether its top-1 is the final layer's.

    Both are among a row's candidates. The hidden rows of every layer, [N, d], are in
    memory at once (9 MB in bf16 for 256 rows of 30 layers of 576), but of their logits
    those of one layer, for some rows, of the tokens that are candidates of any row.
    Collective over the tensor-parallel group.
    """
    layers = backbone.config.num_layers - 1
    tokens, rows, _, indptr, candidates = batch.model_inputs(parallel.device)[:5]
    was_training = backbone.training
    backbone.eval()
    hidden = backbone(tokens, rows, layers)
    backbone.train(was_training)
    streams = [hidden.final, *hidden.layers]
    final, *intermediate = _best_candidates(backbone, streams, indptr, candidates, parallel)
    return {layers - i: final == best for i, best in enumerate(intermediate)}


def _best_candidates(
    backbone: Backbone,
    streams: Sequence[Tensor],
    indptr: Tensor,
    tokens: Tensor,
    parallel: ParallelState,
) -> Tensor:
    """int64 [streams, N]: the candidate with the largest logit
    in each row of each stream; ties to the lower token.
    """
    start, stop = backbone.vocab_range
    is_here = (tokens >= start) & (tokens < stop)
    # In ascending order, and of this rank's tokens alone.
    owned: Tensor = torch.unique(tokens[is_here])
    weight = backbone.head_weight.detach()[owned - start].float()
    num_rows, device = len(streams[0]), tokens.device
    best = torch.full((len(streams), num_rows), -1, dtype=torch.int64, device=device)
    value = torch.full((len(streams), num_rows), -torch.inf, device=device)
    step = max(1, CHUNK_ELEMENTS // max(1, len(owned)))
    for first in range(0, num_rows if len(owned) else 0, step):
        last = min(first + step, num_rows)
        part = slice(int(indptr[first]), int(indptr[last]))
        row = torch.repeat_interleave(
            torch.arange(last - first, device=device), indptr[first : last + 1].diff()
        )
        here = is_here[part]
        column = torch.searchsorted(owned, tokens[part][here])
        is_other = torch.ones(last - first, len(owned), dtype=torch.bool, device=device)
        is_other[row[here], column] = False
        for number, stream in enumerate(streams):
            logits = (stream[first:last].float() @ weight.T).masked_fill_(is_other, -torch.inf)
            value[number, first:last], index = logits.max(dim=1)
            best[number, first:last] = owned[index]
    if parallel.tp == 1:
        return best
    values = [torch.empty_like(value) for _ in range(parallel.tp)]
    bests = [torch.empty_like(best) for _ in range(parallel.tp)]
    dist.all_gather(values, value, group=parallel.tp_group)
    dist.all_gather(bests, best, group=parallel.tp_group)
    owner = torch.stack(values).argmax(dim=0)
    return torch.stack(bests).gather(0, owner[None])[0]
