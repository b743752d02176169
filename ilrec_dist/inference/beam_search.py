"""Constrained beam search: every beam is an item,
under tensor parallelism too (METHOD.md §9).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_dist.common.errors import UserError
from ilrec_dist.inference.inputs import Prefixes
from ilrec_dist.inference.parallel_head import ParallelHead, SoftmaxScope
from ilrec_dist.inference.trie_constraint import ItemSets, TrieConstraint

# Logits and candidates in memory at once, by device type: users are taken in slices below it.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}


class Decoder(Protocol):
    """What ranking needs of a backbone (ilrec_dist.model.gpt.Backbone)."""

    # Whether it drops out; as torch.nn.Module has it.
    training: bool

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    @property
    def vocab_range(self) -> tuple[int, int]: ...

    @property
    def head_weight(self) -> Tensor: ...

    def prefill(self, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Cache]: ...

    def decode(self, cache: Any, tokens: Tensor, parents: Tensor | None = None) -> Tensor: ...


class Cache(Protocol):
    """What a decoder keeps of the prefixes that it has read, and of what it decodes."""

    def branch(self) -> Cache:
        """One that goes on from the same prefixes, whatever this one decodes."""


@dataclass(frozen=True)
class ReadPrefixes:
    """Prefixes that a model has read. Any number of
    searches and scorings go on from them.
    """

    prefixes: Prefixes
    # The hidden state behind each, [B, d].
    hidden: Tensor
    cache: Cache


@dataclass(frozen=True)
class Beams:
    """Completed beams, best first.

    `leaves` are trie nodes at depth C. A user with
    fewer than K has leaf -1 and score -inf behind.
    """

    leaves: Tensor  # int64 [B, K]
    scores: Tensor  # fp32 [B, K], Σ log p


@dataclass(frozen=True)
class RankedItems:
    """Items per user, best first.

    Items that share a code tuple stand next to each
    other in item-id order, with the same `beam`.
    """

    items: np.ndarray  # int32 [B, W], padded with -1
    scores: np.ndarray  # float32 [B, W], padded with -inf
    # The beam that an item comes from.
    beam: np.ndarray  # int32 [B, W], padded with -1


@torch.no_grad()
def read_prefixes(model: Decoder, prefixes: Prefixes) -> ReadPrefixes:
    """Let the model read B prefixes once. It is expected in eval mode."""
    return ReadPrefixes(prefixes, *model.prefill(prefixes.tokens, prefixes.lengths))


@torch.no_grad()
def beam_search(
    model: Decoder,
    constraint: TrieConstraint,
    read: ReadPrefixes,
    *,
    vocab_size: int,
    beam: int = 20,
    softmax_scope: SoftmaxScope = "all",
    excluded: ItemSets | None = None,
    tp_group: dist.ProcessGroup | None = None,
    model_name: str = "the model",
) -> Beams:
    """The `beam` best leaves after each prefix that the model has read, by Σ log p
    without a length penalty.

    log p is over the scope that the model was trained with: `all`, the true vocabulary
    (vocab_size, without padded columns), or `valid_next`, the trie's children of the
    prefix, whatever is excluded. A prefix is a candidate while an item below it is
    allowed and not in the row's `excluded` set, so exclusion costs no beam. With
    tp_group the head is a vocabulary shard, and every rank of the group must call with
    the same arguments and gets the same beams. The model is expected in eval mode.
    Raises UserError with `model_name` where a log p is not finite.
    """
    head = ParallelHead(model.head_weight, model.vocab_range, vocab_size, softmax_scope, tp_group)
    tokens = read.prefixes.tokens
    exhausted = None if excluded is None else constraint.exhausted_nodes(excluded, tokens.device)
    hidden, cache = read.hidden[:, None], read.cache.branch()
    nodes = torch.zeros(len(tokens), 1, dtype=torch.int64, device=tokens.device)
    scores = torch.zeros(len(tokens), 1, device=tokens.device)
    finite = torch.ones((), dtype=torch.bool, device=tokens.device)
    for p in range(constraint.depth):
        width = min(beam, constraint.trie.num_nodes(p + 1))
        row_elements = nodes.shape[1] * max(
            1,
            int(constraint.num_children(p, nodes).max()),
            head.num_columns(constraint.token_range[p]),
        )
        users = max(1, CHUNK_ELEMENTS[tokens.device.type] // row_elements)
        parts = []
        for first in range(0, len(tokens), users):
            part = slice(first, first + users)
            extended, part_finite = _extend(
                head,
                constraint,
                p,
                nodes[part],
                scores[part],
                hidden[part],
                width,
                first,
                exhausted,
            )
            parts.append(extended)
            finite &= part_finite
        nodes, scores, chosen, parents = (torch.cat(column) for column in zip(*parts, strict=True))
        if constraint.titles and bool((constraint.has_ended(p + 1, nodes) | (nodes < 0)).all()):
            nodes = constraint.leaves(p + 1, nodes)
            break
        if p + 2 < constraint.depth or (p + 2 == constraint.depth and softmax_scope == "all"):
            hidden = model.decode(cache, chosen, parents)
        elif p + 2 == constraint.depth:
            branches = constraint.num_children(p + 1, nodes) > 1
            hidden = _decode_branching(model, cache, chosen, parents, branches)
    if not finite:
        raise UserError(
            f"{model_name}: its scores are not finite (NaN or infinite), so its training has "
            "diverged; lower train.learning_rate or lengthen train.warmup, and train again"
        )
    return Beams(nodes, scores)


def _decode_branching(
    model: Decoder, cache: Any, tokens: Tensor, parents: Tensor, branches: Tensor
) -> Tensor:
    """Hidden states [B, K, d] of the beams that branch, zeros for the others.

    It is the last decoding step under `valid_next`: where a
    prefix has one continuation its log p is 0 whatever the model
    says, and with semantic IDs that is most of the last codes.
    """
    most = max(1, int(branches.sum(1).max()))
    order = branches.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    decoded = model.decode(cache, tokens.gather(1, order), parents.gather(1, order))
    hidden = decoded.new_zeros(*tokens.shape, decoded.shape[2])
    return hidden.scatter(1, order[..., None].expand_as(decoded), decoded)


def _extend(
    head: ParallelHead,
    constraint: TrieConstraint,
    p: int,
    nodes: Tensor,
    scores: Tensor,
    hidden: Tensor,
    width: int,
    first_row: int,
    exhausted: list[Tensor] | None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """One more token on a slice of users.

    Returns the `width` best as (nodes at depth p + 1, scores, tokens, parents),
    [b, width] each, and whether log p was finite for all candidates (bool []).
    """
    child, token, exists = constraint.children(p, nodes)
    log_p = head.log_probabilities(
        hidden.flatten(0, 1),
        token.flatten(0, 1),
        exists.flatten(0, 1),
        constraint.token_range[p],
    ).view_as(token)
    if constraint.titles:
        # There is no choice behind the end of a title.
        log_p = log_p.masked_fill(constraint.has_ended(p, nodes)[..., None], 0.0)
    finite = (log_p.isfinite() | ~exists).all()
    usable = constraint.has_item_left(p, child, exists, first_row, exhausted)
    total = (scores[..., None] + log_p).masked_fill(~usable, -torch.inf).flatten(1)
    if total.shape[1] < width:
        # Slices differ in the number of their candidates.
        total = torch.nn.functional.pad(total, (0, width - total.shape[1]), value=-torch.inf)
    best, picked = total.topk(width, dim=1)
    parents = (picked // token.shape[2]).clamp(max=nodes.shape[1] - 1)
    picked = picked.clamp(max=token[0].numel() - 1)
    nodes = child.flatten(1).gather(1, picked).masked_fill(best == -torch.inf, -1)
    return (nodes, best, token.flatten(1).gather(1, picked), parents), finite


def expand_beams(
    constraint: TrieConstraint, beams: Beams, excluded: ItemSets | None = None
) -> RankedItems:
    """The items of the leaves, without those that
    are not allowed or excluded for the user.
    """
    leaves, scores = beams.leaves.cpu().numpy(), beams.scores.cpu().numpy()
    alive = np.flatnonzero(leaves.ravel() >= 0)
    indptr, items = constraint.trie.leaf_items(leaves.ravel()[alive])
    # For every item, the flat index [row, beam] of its leaf.
    leaf_index = np.repeat(alive, np.diff(indptr))
    row = leaf_index // leaves.shape[1]
    keep = np.ones(len(items), bool) if constraint.allowed is None else constraint.allowed[items]
    if excluded is not None:
        count = constraint.trie.catalogue.num_items
        keep &= ~np.isin(row * count + items, excluded.rows * count + excluded.items)
    leaf_index, items, row = leaf_index[keep], items[keep], row[keep]
    lengths = np.bincount(row, minlength=len(leaves))
    column = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    shape = (len(leaves), int(lengths.max(initial=0)))
    ranked = RankedItems(
        np.full(shape, -1, np.int32),
        np.full(shape, -np.inf, np.float32),
        np.full(shape, -1, np.int32),
    )
    ranked.items[row, column] = items
    ranked.scores[row, column] = scores.ravel()[leaf_index]
    ranked.beam[row, column] = leaf_index % leaves.shape[1]
    return ranked
