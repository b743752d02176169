"""Constrained beam search over the catalogue's trie: every beam is an item, under tensor parallelism too (METHOD.md §9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_dist.common.errors import UserError
from ilrec_dist.items.trie import Trie
from ilrec_dist.items.vocabulary import NO_TOKEN

SoftmaxScope = Literal["all", "valid_next"]
ELEMENTS_AT_ONCE = {
    "cpu": 1 << 23,
    "cuda": 1 << 27,
}  # logits and candidates held at once: users are taken in slices so that neither exceeds it


class Decoder(Protocol):
    """What beam search needs of a backbone (ilrec_dist.model.gpt.Backbone)."""

    @property
    def vocab_range(self) -> tuple[int, int]: ...

    @property
    def head_weight(self) -> Tensor: ...

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Any]: ...

    def decode(self, cache: Any, tokens: Tensor, parents: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class ItemSets:
    """A set of items for each user of a batch, as distinct (row, item) pairs in ascending order; int64 [nnz] both."""

    rows: np.ndarray
    items: np.ndarray

    @staticmethod
    def of(histories: Sequence[np.ndarray]) -> ItemSets:
        rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        items = (
            np.concatenate([np.asarray(history, np.int64) for history in histories])
            if len(histories)
            else np.zeros(0, np.int64)
        )
        span = int(items.max(initial=0)) + 1
        return ItemSets(*np.divmod(np.unique(rows * span + items), span))


@dataclass(frozen=True)
class Beams:
    """Completed beams, best first. `leaves` are trie nodes at depth C; where a user has fewer, -1 with score -inf at the end."""

    leaves: Tensor  # int64 [B, K]
    scores: Tensor  # fp32 [B, K], Σ log p


class TrieConstraint:
    """The trie on the model's device, narrowed to `allowed` items (bool [num_items]; None: all). Made once, used for every batch."""

    def __init__(
        self, trie: Trie, device: torch.device | str = "cpu", allowed: np.ndarray | None = None
    ) -> None:
        self.trie, self.allowed, self.depth = trie, allowed, trie.depth
        self.titles = trie.catalogue.pieces is not None
        in_code_order = (
            np.ones(trie.catalogue.num_items, bool)
            if allowed is None
            else allowed[trie.catalogue.items]
        )
        allowed_before = np.zeros(len(in_code_order) + 1, np.int32)
        np.cumsum(in_code_order, dtype=np.int32, out=allowed_before[1:])
        self._available = [
            np.diff(allowed_before[start]) for start in trie.node_start
        ]  # allowed items below every node
        self._empty = (
            None
            if allowed is None
            else [torch.from_numpy(count == 0).to(device) for count in self._available]
        )
        self._child_start = [
            torch.from_numpy(start).to(device) for start in trie.child_start
        ]  # int32: on a CPU the trie's own memory
        vocabulary, tokens = trie.catalogue.vocabulary, trie.node_token
        if self.titles:
            # Nodes at and behind a title's end. What stands behind it is fed to the model as
            # padding, so that every token here is an id that the model has.
            ended = [(token == vocabulary.end) | (token == NO_TOKEN) for token in tokens[1:]]
            self._ended = [
                torch.from_numpy(flags).to(device) for flags in [np.zeros(1, bool), *ended]
            ]
            tokens = [np.where(token == NO_TOKEN, vocabulary.padding, token) for token in tokens]
        self._token = [torch.from_numpy(token).to(device) for token in tokens]
        self.token_range = [
            (int(token.min()), int(token.max()) + 1) for token in tokens[1:]
        ]  # of the tokens that follow depth p

    def children(self, p: int, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """nodes int64 [B, K] at depth p, -1 for none → their children, padded: (nodes at depth p + 1, tokens, is there one), each [B, K, c]."""
        start, count = self._child_start[p][nodes.clamp(min=0)].long(), self.num_children(p, nodes)
        offset = torch.arange(max(1, int(count.max())), device=nodes.device)
        exists = offset < count[..., None]
        child = torch.where(exists, start[..., None] + offset, 0)
        return child, self._token[p + 1][child].long(), exists

    def ended(self, p: int, nodes: Tensor) -> Tensor:
        """bool [B, K]: whether the titles of nodes int64 [B, K] at depth p have ended."""
        return self._ended[p][nodes.clamp(min=0)]

    def leaves(self, p: int, nodes: Tensor) -> Tensor:
        """int64 [B, K]: the nodes at depth C of nodes at depth p behind which nothing branches; -1 for -1."""
        for start in self._child_start[p:]:
            nodes = torch.where(nodes >= 0, start[nodes.clamp(min=0)].long(), -1)
        return nodes

    def num_children(self, p: int, nodes: Tensor) -> Tensor:
        """int64 [B, K]: how many continuations the nodes at depth p have; 0 for -1."""
        known = nodes.clamp(min=0)
        return (self._child_start[p][known + 1] - self._child_start[p][known]).long() * (nodes >= 0)

    def closed(self, excluded: ItemSets, device: torch.device | str) -> list[Tensor]:
        """Per depth 1 … C, the nodes with no item left to a user once theirs are taken away: sorted keys row · num_nodes + node."""
        rows, items = excluded.rows, excluded.items
        if self.allowed is not None:
            rows, items = rows[self.allowed[items]], items[self.allowed[items]]
        closed = []
        for p in range(1, self.depth + 1):
            nodes = self.trie.num_nodes(p)
            keys, taken = np.unique(
                rows * nodes + self.trie.item_node(p, items), return_counts=True
            )
            closed.append(
                torch.from_numpy(keys[taken == self._available[p][keys % nodes]]).to(device)
            )
        return closed

    def open(
        self, p: int, child: Tensor, exists: Tensor, first_row: int, closed: list[Tensor] | None
    ) -> Tensor:
        """bool [B, K, c]: the children at depth p + 1 below which the user has an item left. `first_row` is the batch row of child[0]."""
        usable = exists if self._empty is None else exists & ~self._empty[p + 1][child]
        if closed is None or closed[p].numel() == 0:
            return usable
        row = torch.arange(first_row, first_row + child.shape[0], device=child.device)[
            :, None, None
        ]
        keys = row * self.trie.num_nodes(p + 1) + child
        place = torch.searchsorted(closed[p], keys).clamp(max=closed[p].numel() - 1)
        return usable & (closed[p][place] != keys)


@torch.no_grad()
def beam_search(
    model: Decoder,
    space: TrieConstraint,
    tokens: Tensor,
    *,
    vocab_size: int,
    beam: int = 20,
    softmax_scope: SoftmaxScope = "all",
    excluded: ItemSets | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Beams:
    """The `beam` best items after each prefix, tokens int64 [B, S] (equal lengths, no padding), by Σ log p without a length penalty.

    log p is over the scope that the model was trained with: `all`, the true vocabulary (vocab_size; padded columns are none of it), or
    `valid_next`, the trie children of the prefix, whatever is excluded. A prefix is a candidate while an item that is allowed and not in
    the user's `excluded` set lies below it, so what is taken away costs no beam. With tp_group the head is a vocabulary shard, and every
    rank of the group must call with the same arguments and gets the same beams. The model is expected in eval mode. Raises
    UserError when it gives NaN.
    """
    head = _Head(model, vocab_size, softmax_scope, tp_group)
    closed = None if excluded is None else space.closed(excluded, tokens.device)
    hidden, cache = model.prefill(tokens)
    hidden = hidden[:, None]
    nodes = torch.zeros(len(tokens), 1, dtype=torch.int64, device=tokens.device)
    scores = torch.zeros(len(tokens), 1, device=tokens.device)
    for p in range(space.depth):
        width = min(beam, space.trie.num_nodes(p + 1))
        wide = nodes.shape[1] * max(
            1, int(space.num_children(p, nodes).max()), head.width(space.token_range[p])
        )
        users = max(1, ELEMENTS_AT_ONCE[tokens.device.type] // wide)
        parts = [
            _extend(
                head,
                space,
                p,
                nodes[at : at + users],
                scores[at : at + users],
                hidden[at : at + users],
                width,
                at,
                closed,
            )
            for at in range(0, len(tokens), users)
        ]
        nodes, scores, chosen, parents = (torch.cat(column) for column in zip(*parts, strict=True))
        if space.titles and bool((space.ended(p + 1, nodes) | (nodes < 0)).all()):
            nodes = space.leaves(p + 1, nodes)
            break
        if p + 2 < space.depth or (p + 2 == space.depth and softmax_scope == "all"):
            hidden = model.decode(cache, chosen, parents)
        elif p + 2 == space.depth:
            hidden = _decode_where_it_matters(
                model, cache, chosen, parents, space.num_children(p + 1, nodes) > 1
            )
    if scores.isnan().any():
        raise UserError(
            "beam search: the model's scores are NaN: its training has diverged; lower train.learning_rate or lengthen train.warmup"
        )
    return Beams(nodes, scores)


def _decode_where_it_matters(
    model: Decoder, cache: Any, tokens: Tensor, parents: Tensor, branches: Tensor
) -> Tensor:
    """The last decoding step under `valid_next`: hidden states [B, K, d] of the beams that branch, anything for the others.

    Where a prefix has one continuation its log p is 0 whatever the model says; with semantic IDs that is most of the last codes.
    """
    most = max(1, int(branches.sum(1).max()))
    order = branches.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    found = model.decode(cache, tokens.gather(1, order), parents.gather(1, order))
    hidden = found.new_zeros(*tokens.shape, found.shape[2])
    return hidden.scatter(1, order[..., None].expand_as(found), found)


def _extend(
    head: _Head,
    space: TrieConstraint,
    p: int,
    nodes: Tensor,
    scores: Tensor,
    hidden: Tensor,
    width: int,
    first_row: int,
    closed: list[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One more token on a slice of users: the `width` best (nodes at depth p + 1, scores, tokens, parents), [b, width] each."""
    child, token, exists = space.children(p, nodes)
    log_p = head.log_probabilities(
        hidden.flatten(0, 1), token.flatten(0, 1), exists.flatten(0, 1), space.token_range[p]
    ).view_as(token)
    if space.titles:
        # There is no choice behind the end of a title.
        log_p = log_p.masked_fill(space.ended(p, nodes)[..., None], 0.0)
    total = (
        (scores[..., None] + log_p)
        .masked_fill(~space.open(p, child, exists, first_row, closed), -torch.inf)
        .flatten(1)
    )
    if total.shape[1] < width:  # slices differ in how many candidates they have
        total = torch.nn.functional.pad(total, (0, width - total.shape[1]), value=-torch.inf)
    best, picked = total.topk(width, dim=1)
    parents = (picked // token.shape[2]).clamp(max=nodes.shape[1] - 1)
    picked = picked.clamp(max=token[0].numel() - 1)
    dead = best == -torch.inf
    chosen = child.flatten(1).gather(1, picked).masked_fill(dead, -1)
    return chosen, best, token.flatten(1).gather(1, picked), parents


class _Head:
    """log p of candidate tokens from this rank's shard of the output head; logits are fp32."""

    def __init__(
        self,
        model: Decoder,
        vocab_size: int,
        scope: SoftmaxScope,
        tp_group: dist.ProcessGroup | None,
    ) -> None:
        self.weight, (self.start, self.stop) = model.head_weight.detach(), model.vocab_range
        self.vocab_size, self.scope = vocab_size, scope
        self.group = tp_group if tp_group is not None and tp_group.size() > 1 else None

    def columns(self, tokens: tuple[int, int]) -> tuple[int, int]:
        """The vocabulary range that a step needs: all of it, or just where its candidates lie."""
        return (0, self.vocab_size) if self.scope == "all" else tokens

    def width(self, tokens: tuple[int, int]) -> int:
        low, high = self.columns(tokens)
        return high - low

    def log_probabilities(
        self, hidden: Tensor, token: Tensor, exists: Tensor, tokens: tuple[int, int]
    ) -> Tensor:
        """hidden [R, d], candidate tokens int64 [R, c] of which some exist → fp32 [R, c]; what stands where none exists means nothing."""
        low, high = self.columns(tokens)
        low, high = max(low, self.start), min(high, self.stop)
        if self.group is None:
            logits = hidden.float() @ self.weight[low - self.start : high - self.start].float().T
            own = logits.gather(1, torch.where(exists, token - low, 0))
            if self.scope == "all":
                return own - logits.logsumexp(1, keepdim=True)
        else:
            high = max(low, high)  # a shard may hold none of the columns
            logits = hidden.float() @ self.weight[low - self.start : high - self.start].float().T
            ours = exists & (token >= low) & (token < high)
            own = torch.zeros(token.shape, device=hidden.device)
            if high > low:
                own = torch.where(ours, logits.gather(1, torch.where(ours, token - low, 0)), own)
            dist.all_reduce(own, group=self.group)  # one rank's logit and zeros: exact
            if self.scope == "all":
                return own - self._log_normaliser(logits)
        return own - own.masked_fill(~exists, -torch.inf).logsumexp(1, keepdim=True)

    def _log_normaliser(self, logits: Tensor) -> Tensor:
        top = (
            logits.amax(1, keepdim=True)
            if logits.shape[1]
            else logits.new_full((len(logits), 1), -torch.inf)
        )
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        total = (logits - top).exp().sum(1, keepdim=True)
        dist.all_reduce(total, group=self.group)
        return top + total.log()


@dataclass(frozen=True)
class RankedItems:
    """Items per user, best first. Items that share a code tuple follow each other in item-id order and carry the same `beam`."""

    items: np.ndarray  # int32 [B, W], padded with -1
    scores: np.ndarray  # float32 [B, W], padded with -inf
    beam: np.ndarray  # int32 [B, W], the beam that an item comes from, padded with -1


def expand(space: TrieConstraint, beams: Beams, excluded: ItemSets | None = None) -> RankedItems:
    """Leaves into items, without what is not allowed or excluded for the user."""
    leaves, scores = beams.leaves.cpu().numpy(), beams.scores.cpu().numpy()
    places = np.flatnonzero(leaves.ravel() >= 0)
    indptr, items = space.trie.leaf_items(leaves.ravel()[places])
    places = np.repeat(places, np.diff(indptr))
    row = places // leaves.shape[1]
    keep = np.ones(len(items), bool) if space.allowed is None else space.allowed[items]
    if excluded is not None:
        count = space.trie.catalogue.num_items
        keep &= ~np.isin(row * count + items, excluded.rows * count + excluded.items)
    places, items, row = places[keep], items[keep], row[keep]
    each = np.bincount(row, minlength=len(leaves))
    column = np.arange(len(items)) - np.repeat(np.cumsum(each) - each, each)
    shape = (len(leaves), int(each.max(initial=0)))
    ranked = RankedItems(
        np.full(shape, -1, np.int32),
        np.full(shape, -np.inf, np.float32),
        np.full(shape, -1, np.int32),
    )
    ranked.items[row, column] = items
    ranked.scores[row, column] = scores.ravel()[places]
    ranked.beam[row, column] = places % leaves.shape[1]
    return ranked
