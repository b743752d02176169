"""Token rewards r(v): how much of a prefix's collaborative probability each next token leads to, for many targets at once (METHOD.md §5)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ilrec_dist.cf.client import Meter, Pending, ThreadPending
from ilrec_dist.cf.folder import catalogue_hash, load_cf, load_folds, read_manifest
from ilrec_dist.cf.model import SASRec, encode
from ilrec_dist.cf.segments import child_shares, ragged_ranges
from ilrec_dist.data.prepared import Prepared
from ilrec_dist.errors import UserError
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie

SCORES_AT_ONCE = 1 << 22  # fp32 scores held at once: 16 MiB


@dataclass(frozen=True)
class FoldModel:
    """One fold's scorer: its SASRec, its item vectors in code order, and a bias of −inf where it knows no such item (None: it knows all)."""

    model: SASRec
    vectors: torch.Tensor  # fp32 [n, d]
    bias: torch.Tensor | None  # fp32 [n]

    @staticmethod
    def of(model: SASRec, catalogue: Catalogue) -> FoldModel:
        order = torch.from_numpy(catalogue.items.astype(np.int64))
        known = model.known[order]
        bias = None if bool(known.all()) else torch.zeros(len(order)).masked_fill_(~known, -torch.inf)
        return FoldModel(model, model.items.weight.detach()[order].contiguous(), bias)

    def scores(self, queries: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
        """Logits of the code-order positions [start, stop) for queries [t, d], into out fp32 [t, stop − start]."""
        torch.mm(queries, self.vectors[start:stop].t(), out=out)
        if self.bias is not None:
            out += self.bias[start:stop]


class TokenRewards:
    """In-process rewards. Each user is scored by the model of their fold, which saw none of that user's sequence."""

    def __init__(self, models: list[SASRec], folds: np.ndarray, prepared: Prepared, catalogue: Catalogue, trie: Trie) -> None:
        self.folds, self.prepared, self.catalogue, self.trie = folds, prepared, catalogue, trie
        self.models = [FoldModel.of(model, catalogue) for model in models]
        self.counters = {"calls": 0, "targets": 0, "rows": 0, "covered_rows": 0, "seconds": 0.0}
        self.meter = Meter()

    @staticmethod
    def open(cf_folder: str | Path, prepared: Prepared, catalogue: Catalogue, trie: Trie) -> TokenRewards:
        """Load what `train_cf` wrote. Raises UserError when a file's hash, or the number of users or items, or the catalogue is not what it was trained for."""
        manifest = read_manifest(cf_folder)
        folds = load_folds(cf_folder)
        for what, found, expected in (("users", prepared.num_users, len(folds)), ("items", prepared.num_items, manifest["items"])):
            if found != expected:
                raise UserError(f"{cf_folder}: its models were trained for {expected} {what}, the prepared data has {found}; run `ilrec cf` again")
        if manifest["catalogue"] not in (None, catalogue_hash(catalogue)):
            raise UserError(f"{cf_folder}: made for another catalogue (the hash in manifest.json differs); run `ilrec cf` again")
        models = [load_cf(cf_folder, f"fold{fold}") for fold in range(manifest["config"]["cf_folds"])]
        return TokenRewards(models, folds, prepared, catalogue, trie)

    def fetch(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rewards of T targets: float32 [nnz], one-to-one with the tokens of `trie.target_candidates(target items)`.

        Target (user, position), int [T] each, is item `prepared.sequence(user)[position]`, position ≥ 1; only what stands before it is read,
        so nothing at or after the target changes a bit. r(v) = Σ P_CF over items below (prefix, v) ÷ Σ below the prefix; 0 for items that the
        model does not know. Raises ValueError for a position that is no target.
        """
        started = time.perf_counter()
        users, positions = np.asarray(users, np.int64), np.asarray(positions, np.int64)
        starts = self.prepared.offsets[users]
        if ((positions < 1) | (positions >= self.prepared.offsets[users + 1] - starts)).any():
            raise ValueError("a reward needs a position in [1, length of the user's sequence)")
        plan = _Plan(self.trie, self.prepared.items[starts + positions])
        rewards = np.empty(plan.indptr[-1], np.float32)
        for fold in np.unique(self.folds[users]):
            model = self.models[fold]
            chosen = np.flatnonzero(self.folds[users] == fold)
            queries = encode(model.model, self.prepared.items, starts[chosen], positions[chosen])
            _first_codes(model, queries, chosen, plan, rewards)
            _deeper_codes(model, queries, chosen, plan, rewards)
        self._count(plan, rewards, time.perf_counter() - started)
        return rewards

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> Pending:
        """Begin `fetch` on a thread of its own, one request at a time, and return at once; `.result()` gives the rewards."""
        return ThreadPending(self.meter, self._thread, lambda: self.fetch(users, positions))

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="token-rewards")

    def _count(self, plan: _Plan, rewards: np.ndarray, seconds: float) -> None:
        """Add one call to the counters: rows are targets × code levels, covered ones have a reward above 0."""
        rows = len(plan.indptr) - 1
        covered = np.count_nonzero(np.add.reduceat(rewards, plan.indptr[:-1])) if rows else 0
        for key, value in (("calls", 1), ("targets", len(plan.order)), ("rows", rows), ("covered_rows", covered), ("seconds", seconds)):
            self.counters[key] += value


class _Plan:
    """Where each target's rewards go: its node and its children at every depth, and the place of each (target, depth) row in the output."""

    def __init__(self, trie: Trie, items: np.ndarray) -> None:
        self.trie = trie
        self.order = trie.catalogue.position[items]  # code-order position of each target item
        self.nodes = np.stack([np.searchsorted(trie.node_start[p], self.order, side="right") - 1 for p in range(trie.depth)])  # [C, T]
        first = np.stack([trie.child_start[p][self.nodes[p]] for p in range(trie.depth)]).astype(np.int64)
        stop = np.stack([trie.child_start[p][self.nodes[p] + 1] for p in range(trie.depth)]).astype(np.int64)
        self.first_child, self.children = first, stop - first  # [C, T]
        self.indptr = np.concatenate([[0], np.cumsum(self.children.T.ravel())])

    def ranges(self, depth: int, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Code-order [start, stop) of the targets' prefixes of that depth."""
        start, nodes = self.trie.node_start[depth], self.nodes[depth, targets]
        return start[nodes].astype(np.int64), start[nodes + 1].astype(np.int64)

    def child_lengths(self, depth: int, targets: np.ndarray) -> np.ndarray:
        """Items below every child of the targets' prefixes, concatenated."""
        child = ragged_ranges(self.first_child[depth, targets], self.children[depth, targets])
        return (self.trie.node_start[depth + 1][child + 1] - self.trie.node_start[depth + 1][child]).astype(np.int64)

    def store(self, out: np.ndarray, depth: int, targets: np.ndarray, shares: np.ndarray) -> None:
        """Put the children's shares of the targets' rows of that depth in place."""
        out[ragged_ranges(self.indptr[targets * self.trie.depth + depth], self.children[depth, targets])] = shares


def _first_codes(model: FoldModel, queries: torch.Tensor, targets: np.ndarray, plan: _Plan, out: np.ndarray) -> None:
    """Depth 0: the whole catalogue is scored for every target."""
    n = plan.trie.catalogue.num_items
    step = max(1, SCORES_AT_ONCE // n)
    buffer = torch.empty(min(step, len(targets)), n)
    for begin in range(0, len(targets), step):
        part = targets[begin : begin + step]
        scores = buffer[: len(part)]
        model.scores(queries[begin : begin + step], 0, n, scores)
        shares = child_shares(scores.numpy().ravel(), np.full(len(part), n), plan.child_lengths(0, part), plan.children[0, part])
        plan.store(out, 0, part, shares)


def _deeper_codes(model: FoldModel, queries: torch.Tensor, targets: np.ndarray, plan: _Plan, out: np.ndarray) -> None:
    """Depths 1 …: one scan of each target's first-level range serves all of them. Targets that share the range are one matrix product."""
    depth = plan.trie.depth
    if depth == 1:
        return
    by_code = np.argsort(plan.order[targets], kind="stable")
    start, stop = plan.ranges(1, targets[by_code])
    for piece in _pieces(stop - start):
        rows, low, high = by_code[piece], start[piece], stop[piece]
        begin = np.cumsum(high - low) - (high - low)  # of each target's scores in the flat buffer
        flat = torch.empty(int((high - low).sum()))
        groups = np.flatnonzero(np.diff(low, prepend=-1))
        picked = queries[torch.from_numpy(rows)]
        for first, last in zip(groups, np.append(groups[1:], len(rows)), strict=True):
            width = int(high[first] - low[first])
            block = flat[begin[first] : begin[first] + width * (last - first)].view(last - first, width)
            model.scores(picked[first:last], int(low[first]), int(high[first]), block)
        part, scores = targets[rows], flat.numpy()
        for level in range(1, depth):
            inner_low, inner_high = plan.ranges(level, part)
            own = scores if level == 1 else scores[ragged_ranges(begin + inner_low - low, inner_high - inner_low)]
            shares = child_shares(own, inner_high - inner_low, plan.child_lengths(level, part), plan.children[level, part])
            plan.store(out, level, part, shares)


def _pieces(sizes: np.ndarray) -> Iterator[slice]:
    """Consecutive slices whose sizes add up to about SCORES_AT_ONCE, at least one row each."""
    which = (np.cumsum(sizes) - sizes) // SCORES_AT_ONCE
    bounds = np.append(np.flatnonzero(np.diff(which, prepend=-1)), len(sizes))
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        yield slice(first, last)
