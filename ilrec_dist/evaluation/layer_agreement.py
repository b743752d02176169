"""How often an intermediate layer's best continuation is the final layer's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.samples.collate import Batch

# Layers under the final one that are compared, at most.
MOST_LAYERS = 8
# Logits in memory at once.
CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def layer_agreement(backbone: Backbone, batch: Batch, parallel: ParallelState) -> dict[int, Tensor]:
    """bool [N] for each layer's number: whether its top-1 is the final layer's.

    Both are among a row's candidates. Collective over the tensor-parallel group.
    """
    layers = min(MOST_LAYERS, backbone.config.num_layers - 1)
    tokens, rows, _, indptr, candidates = batch.model_inputs(parallel.device)[:5]
    was_training = backbone.training
    backbone.eval()
    hidden = backbone(tokens, rows, layers)
    backbone.train(was_training)
    final = _best_candidates(backbone, hidden.final, indptr, candidates, parallel)
    return {
        backbone.config.num_layers - 1 - i: final
        == _best_candidates(backbone, stream, indptr, candidates, parallel)
        for i, stream in enumerate(hidden.layers)
    }


def _best_candidates(
    backbone: Backbone, hidden: Tensor, indptr: Tensor, tokens: Tensor, parallel: ParallelState
) -> Tensor:
    """int64 [N]: the candidate with the largest
    logit in each row; ties to the lower token.
    """
    start, stop = backbone.vocab_range
    weight = backbone.head_weight.detach().float()
    best = torch.full((len(hidden),), -1, dtype=torch.int64, device=hidden.device)
    value = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    step = max(1, CHUNK_ELEMENTS // max(1, len(weight)))
    for first in range(0, len(hidden), step):
        last = min(first + step, len(hidden))
        logits = hidden[first:last].float() @ weight.T
        counts = indptr[first : last + 1].diff()
        candidates = tokens[indptr[first] : indptr[last]]
        row = torch.repeat_interleave(torch.arange(len(counts), device=hidden.device), counts)
        here = (candidates >= start) & (candidates < stop)
        allowed = torch.full_like(logits, -torch.inf)
        index = row[here], candidates[here] - start
        allowed[index] = logits[index]
        if allowed.shape[1]:
            value[first:last], column = allowed.max(dim=1)
            best[first:last] = column + start
    if parallel.tp == 1:
        return best
    values = [torch.empty_like(value) for _ in range(parallel.tp)]
    bests = [torch.empty_like(best) for _ in range(parallel.tp)]
    dist.all_gather(values, value, group=parallel.tp_group)
    dist.all_gather(bests, best, group=parallel.tp_group)
    owner = torch.stack(values).argmax(dim=0)
    return torch.stack(bests).gather(0, owner[None])[0]
