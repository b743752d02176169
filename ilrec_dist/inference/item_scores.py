"""Exact Σ log p of given items along their paths in the trie (METHOD.md §12)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_dist.common.errors import UserError
from ilrec_dist.inference.beam_search import CHUNK_ELEMENTS, Decoder, ReadPrefixes
from ilrec_dist.inference.parallel_head import ParallelHead, SoftmaxScope
from ilrec_dist.inference.trie_constraint import TrieConstraint


@torch.no_grad()
def score_items(
    model: Decoder,
    constraint: TrieConstraint,
    read: ReadPrefixes,
    items: Tensor,
    *,
    vocab_size: int,
    softmax_scope: SoftmaxScope = "all",
    tp_group: dist.ProcessGroup | None = None,
    model_name: str = "the model",
) -> Tensor:
    """fp32 [B, K] Σ log p of items int64 [B, K] after
    B prefixes that the model has read; -inf for item -1.

    It is what a beam over the whole catalogue would give these items: the same scopes,
    ends of titles and tensor parallelism as `beam_search`. The model is expected in
    eval mode. Raises UserError with `model_name` where a log p is not finite.
    """
    head = ParallelHead(model.head_weight, model.vocab_range, vocab_size, softmax_scope, tp_group)
    trie, device = constraint.trie, items.device
    known = items.clamp(min=0).cpu().numpy()
    hidden, cache = read.hidden[:, None], read.cache.branch()
    nodes = torch.zeros_like(items)
    scores = torch.zeros(items.shape, device=device)
    for p in range(constraint.depth):
        next_nodes = torch.from_numpy(trie.item_node(p + 1, known)).to(device)
        # At the root all items of a row have one hidden state.
        parents = nodes[:, :1] if p == 0 else nodes
        token, log_p = _path_step(head, constraint, p, parents, next_nodes, hidden)
        if constraint.titles:
            log_p = log_p.masked_fill(constraint.has_ended(p, nodes), 0.0)
        scores += log_p
        nodes = next_nodes
        if p + 1 < constraint.depth:
            start = torch.zeros_like(items) if p == 0 else None
            hidden = model.decode(cache, token, start)
    scores = scores.masked_fill(items < 0, -torch.inf)
    if not (scores.isfinite() | (items < 0)).all():
        raise UserError(
            f"{model_name}: its scores are not finite (NaN or infinite), so its training has "
            "diverged; lower train.learning_rate or lengthen train.warmup, and train again"
        )
    return scores


def _path_step(
    head: ParallelHead,
    constraint: TrieConstraint,
    p: int,
    parents: Tensor,
    next_nodes: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """(tokens, log p) of the step from nodes at
    depth p to nodes at depth p + 1, [B, K] each.

    `parents` int64 [B, K], or [B, 1] where all next
    nodes have one parent, with `hidden` alike.
    """
    widest = max(1, int(constraint.num_children(p, parents).max()))
    row_elements = parents.shape[1] * max(widest, head.num_columns(constraint.token_range[p]))
    rows = max(1, CHUNK_ELEMENTS[parents.device.type] // row_elements)
    tokens, log_ps = [], []
    for first in range(0, len(parents), rows):
        part = slice(first, first + rows)
        child, token, exists = constraint.children(p, parents[part])
        log_p = head.log_probabilities(
            hidden[part].flatten(0, 1),
            token.flatten(0, 1),
            exists.flatten(0, 1),
            constraint.token_range[p],
        ).view_as(token)
        # The children of a node are consecutive, so the first one gives the others' columns.
        column = next_nodes[part] - child[..., 0]
        if parents.shape[1] == 1:
            tokens.append(token[:, 0].gather(1, column))
            log_ps.append(log_p[:, 0].gather(1, column))
        else:
            tokens.append(token.gather(2, column[..., None])[..., 0])
            log_ps.append(log_p.gather(2, column[..., None])[..., 0])
    return torch.cat(tokens), torch.cat(log_ps)
