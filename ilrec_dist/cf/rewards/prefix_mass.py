"""Sums the collaborative probability below prefixes: by scanning ranges, or by top items and cell moments where ranges are long (METHOD.md §5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ilrec_dist.cf.rewards.ann import search
from ilrec_dist.cf.rewards.cell_moments import CellMoments, log_masses
from ilrec_dist.cf.rewards.item_scorer import PREFIX_ITEMS, FoldScorer
from ilrec_dist.cf.rewards.layout import Plan
from ilrec_dist.cf.rewards.segment_softmax import child_shares, softmax_rows
from ilrec_dist.common.ragged import ragged_ranges

SCORES_AT_ONCE = (
    1 << 20
)  # fp32 scores held at once: 4 MiB, which stay in the cache between the passes
QUERIES_AT_ONCE = 256
ESTIMATES_AT_ONCE = 128


@dataclass(frozen=True)
class RewardOptions:
    """How closely a large catalogue is looked at; small ones are scanned whole."""

    top_k: int = 64  # items scored exactly for the first code; a quarter more are fetched to make up for a rough index
    width: int = 8  # the index looks at about width × top_k items
    prefix_items: int = PREFIX_ITEMS  # at least the value the store was written with


@dataclass(frozen=True)
class Hits:
    """Items scored one by one for each of t targets: those an index found, and the target itself."""

    where: np.ndarray  # int64 [t, k] code-order positions, −1: none
    score: np.ndarray  # float32 [t, k]
    cap: np.ndarray  # float32 [t], what bounds the score of every other item

    def cells(self, node_start: np.ndarray, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """int64 [t, k]: which of the nodes first … stop − 1 (int [t]) of a depth each item lies below, counted from first; −1: none of them."""
        inside = (
            (self.where >= node_start[first][:, None])
            & (self.where < node_start[stop][:, None])
            & (self.score > -np.inf)
        )
        cell = np.full(self.where.shape, -1, np.int64)
        row, _ = np.nonzero(inside)
        cell[inside] = (
            np.searchsorted(node_start, self.where[inside], side="right") - 1 - first[row]
        )
        return cell


def scan_catalogue(
    scorer: FoldScorer,
    queries: torch.Tensor,
    targets: np.ndarray,
    plan: Plan,
    first: np.ndarray,
    deeper: np.ndarray,
) -> None:
    """All depths of a small catalogue from one product: log Σ exp(score) below each first code into the rows `targets` of first float32 [T, codes], the
    children's shares of the targets' deeper prefixes into deeper at `plan.place`."""
    n, starts = plan.trie.catalogue.num_items, plan.trie.node_start[1][:-1]
    step = max(1, SCORES_AT_ONCE // n)
    buffer = torch.empty(min(step, len(targets)), n)
    for begin in range(0, len(targets), step):
        part = targets[begin : begin + step]
        scores = buffer[: len(part)]
        scorer.scores(queries[begin : begin + step], 0, n, scores)
        if plan.trie.depth > 1:
            low, high = plan.ranges(1, part)
            picked = scores.numpy().ravel()[
                ragged_ranges(np.arange(len(part)) * n + low, high - low)
            ]
            _fill(picked, part, low, high, np.ones(len(part), np.int64), plan, deeper)
        top = scores.amax(1, keepdim=True)
        top.masked_fill_(torch.isneginf(top), 0)
        mass = np.add.reduceat(scores.sub_(top).exp_().numpy(), starts, axis=1)
        with np.errstate(divide="ignore"):
            first[part] = np.log(mass) + top.numpy()


def first_log_masses(
    scorer: FoldScorer,
    queries: torch.Tensor,
    targets: np.ndarray,
    plan: Plan,
    out: np.ndarray,
    options: RewardOptions,
) -> list[Hits]:
    """Depth 0 of a large catalogue: log Σ exp(score) below each first code that the scorer holds, into the rows `targets` of out float32 [T, codes].

    Returns the items it scored one by one, per shard and for all `targets`.
    """
    assert scorer.large is not None
    column = 0
    all_hits = []
    for (first, stop), known, index in zip(
        scorer.large.shards, scorer.large.known, scorer.large.indexes, strict=True
    ):
        hits = _find(scorer, index, known, queries, plan.order[targets], options)
        all_hits.append(hits)
        for begin in range(0, len(targets), QUERIES_AT_ONCE):
            chunk = slice(begin, begin + QUERIES_AT_ONCE)
            few = Hits(hits.where[chunk], hits.score[chunk], hits.cap[chunk])
            moments = scorer.large.moments[0].scores(first, stop, queries[chunk])
            cells = few.cells(
                plan.trie.node_start[1], np.full(len(few.cap), first), np.full(len(few.cap), stop)
            )
            out[targets[chunk], column : column + stop - first] = log_masses(
                *moments, cells, few.score, few.cap
            )
        column += stop - first
    return all_hits


def _find(
    scorer: FoldScorer,
    index: Any,
    known: np.ndarray,
    queries: torch.Tensor,
    own: np.ndarray,
    options: RewardOptions,
) -> Hits:
    """The top items of each query in an index, scored exactly, and the target `own`, which always is.

    The cap is the k-th largest of the k + k/4 found: an index of rough codes misses items that score as high as the last it finds.
    """
    extra = options.top_k // 4
    found = search(index, queries.numpy(), options.top_k + extra, options.width)
    where = np.sort(np.where(found >= 0, known[found], -1), axis=1).astype(
        np.int64
    )  # in code order: neighbours in memory, read and looked up in turn
    some = where >= 0
    missing = ~(where == own[:, None]).any(1)
    where = np.concatenate([where, np.where(missing, own, -1)[:, None]], axis=1)
    score = scorer.scores_at(queries, torch.from_numpy(np.maximum(where, 0))).numpy()
    score[where < 0] = -np.inf
    last = extra if found.shape[1] > options.top_k else 0
    cap = np.partition(np.where(some, score[:, :-1], np.inf), last, axis=1)[:, last]
    return Hits(where, score, cap)


def deeper_shares(
    scorer: FoldScorer,
    queries: torch.Tensor,
    targets: np.ndarray,
    plan: Plan,
    hits: list[Hits],
    out: np.ndarray,
    options: RewardOptions,
) -> None:
    """Depths 1 … of a large catalogue: each child's share of the target's prefix, into out at `plan.place`; hits are those of first_log_masses for these
    targets.

    One scan of the target's longest prefix of at most `prefix_items` items serves that depth and all below; the depths above it are estimated.
    """
    depth = plan.trie.depth
    base = np.ones(len(targets), np.int64)  # the depth of the prefix that is scanned
    for level in range(1, depth):
        low, high = plan.ranges(level, targets)
        long = high - low > options.prefix_items
        base[long] = level + 1
        _estimate(scorer, queries, targets, np.flatnonzero(long), level, plan, hits, out)
    rows = np.flatnonzero(base < depth)
    rows = rows[np.argsort(plan.order[targets[rows]], kind="stable")]
    start, stop = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for level in np.unique(base[rows]):
        here = base[rows] == level
        start[here], stop[here] = plan.ranges(level, targets[rows[here]])
    for piece in _pieces(stop - start):
        _scan_prefixes(
            scorer,
            queries,
            targets,
            rows[piece],
            start[piece],
            stop[piece],
            base[rows[piece]],
            plan,
            out,
        )


def _scan_prefixes(
    scorer: FoldScorer,
    queries: torch.Tensor,
    targets: np.ndarray,
    rows: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    base: np.ndarray,
    plan: Plan,
    out: np.ndarray,
) -> None:
    """Scan [low, high) for each of `rows` (in code order; into targets and queries) and fill its depths from base on. One product per range."""
    begin = np.cumsum(high - low) - (high - low)  # of each row's scores in the flat buffer
    flat = torch.empty(int((high - low).sum()))
    groups = np.flatnonzero(np.diff(low, prepend=-1))
    picked = queries[torch.from_numpy(rows)]
    for first, last in zip(groups, np.append(groups[1:], len(rows)), strict=True):
        width = int(high[first] - low[first])
        block = flat[begin[first] : begin[first] + width * (last - first)].view(last - first, width)
        scorer.scores(picked[first:last], int(low[first]), int(high[first]), block)
    _fill(flat.numpy(), targets[rows], low, high, base, plan, out)


def _fill(
    scores: np.ndarray,
    targets: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    base: np.ndarray,
    plan: Plan,
    out: np.ndarray,
) -> None:
    """The children's shares of each target's prefixes of depth base and below, from the scores of [low, high) of all targets, concatenated."""
    begin = np.cumsum(high - low) - (high - low)
    for level in range(int(base.min()), plan.trie.depth):
        here = np.flatnonzero(base <= level)
        part = targets[here]
        inner_low, inner_high = plan.ranges(level, part)
        size = inner_high - inner_low
        whole = len(here) == len(targets) and bool((size == high - low).all())
        own = scores if whole else scores[ragged_ranges(begin[here] + inner_low - low[here], size)]
        out[plan.place(level, part)] = child_shares(
            own, size, plan.child_lengths(level, part), plan.children[level, part]
        )


def _estimate(
    scorer: FoldScorer,
    queries: torch.Tensor,
    targets: np.ndarray,
    rows: np.ndarray,
    level: int,
    plan: Plan,
    hits: list[Hits],
    out: np.ndarray,
) -> None:
    """Shares of the children of long prefixes: of the items found for the first code one by one, of the others by the children's moments."""
    assert scorer.large is not None
    starts = np.array([shard[0] for shard in scorer.large.shards])
    shard = np.searchsorted(starts, plan.first_node[targets[rows]], side="right") - 1
    for number, found in enumerate(hits):
        mine = rows[shard == number]
        mine = mine[
            np.argsort(plan.nodes[level, targets[mine]], kind="stable")
        ]  # targets of one prefix side by side
        for begin in range(0, len(mine), ESTIMATES_AT_ONCE):
            here = mine[begin : begin + ESTIMATES_AT_ONCE]
            few = Hits(found.where[here], found.score[here], found.cap[here])
            _estimate_some(
                scorer.large.moments[level],
                queries[torch.from_numpy(here)],
                targets[here],
                level,
                plan,
                few,
                out,
            )


def _estimate_some(
    moments: CellMoments,
    queries: torch.Tensor,
    targets: np.ndarray,
    level: int,
    plan: Plan,
    few: Hits,
    out: np.ndarray,
) -> None:
    """The estimates of targets in the order of their prefixes; few and queries are theirs alone."""
    first, children = plan.first_child[level, targets], plan.children[level, targets]
    count, mean, variance = (
        np.zeros((len(targets), int(children.max())), np.float32) for _ in range(3)
    )
    ends = np.append(np.flatnonzero(np.diff(first)) + 1, len(targets))
    for low, high in zip(np.append(0, ends[:-1]), ends, strict=True):
        group, width, node = slice(low, high), int(children[low]), int(first[low])
        count[group, :width], mean[group, :width], variance[group, :width] = moments.scores(
            node, node + width, queries[group]
        )
    logs = log_masses(
        count,
        mean,
        variance,
        few.cells(plan.trie.node_start[level + 1], first, first + children),
        few.score,
        few.cap,
    )
    inside = np.arange(count.shape[1]) < children[:, None]
    out[plan.place(level, targets)] = softmax_rows(np.where(inside, logs, -np.inf))[inside]


def _pieces(sizes: np.ndarray) -> Iterator[slice]:
    """Consecutive slices whose sizes add up to about SCORES_AT_ONCE, at least one row each."""
    which = (np.cumsum(sizes) - sizes) // SCORES_AT_ONCE
    bounds = np.append(np.flatnonzero(np.diff(which, prepend=-1)), len(sizes))
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        yield slice(first, last)
