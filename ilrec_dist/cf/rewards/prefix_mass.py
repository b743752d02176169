"""Sums the collaborative probability below prefixes (METHOD.md §5).

By scanning ranges of the code-ordered catalogue, or from top items and cell moments
where the ranges are long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ilrec_dist.cf.rewards.ann import search_ann_index
from ilrec_dist.cf.rewards.cell_moments import CellMoments, log_masses
from ilrec_dist.cf.rewards.item_scorer import PREFIX_ITEMS, ItemScorer
from ilrec_dist.cf.rewards.layout import RewardLayout
from ilrec_dist.cf.rewards.segment_softmax import child_shares, softmax_rows
from ilrec_dist.common.ragged import ragged_ranges

# The fp32 scores kept in memory: 4 MiB, which stay in the cache between the passes.
CHUNK_ELEMENTS = 1 << 20
# Queries whose first codes are estimated together.
FIRST_ROWS = 256
# Targets whose deeper codes are estimated together.
DEEPER_ROWS = 128


@dataclass(frozen=True)
class RewardOptions:
    """How closely a large catalogue is looked at; small ones are scanned whole."""

    # Items scored exactly for the first code. A quarter more are fetched, to make up for an
    # index of rough scores.
    top_k: int = 64
    # The index looks at about width × top_k items.
    width: int = 8
    # At least the value that the scorer was written with.
    prefix_items: int = PREFIX_ITEMS


@dataclass(frozen=True)
class ScoredItems:
    """Items scored one by one for t targets: what an index returned, and the target."""

    # int64 [t, k] code-order positions, −1: none.
    positions: np.ndarray
    # float32 [t, k].
    scores: np.ndarray
    # float32 [t]: a bound on the score of every other item.
    cap: np.ndarray

    def select(self, targets: np.ndarray | slice) -> ScoredItems:
        """The same for some of the targets."""
        return ScoredItems(self.positions[targets], self.scores[targets], self.cap[targets])

    def cells(self, node_start: np.ndarray, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """int64 [t, k]: the node of first … stop − 1 above each item; −1: none.

        The nodes are of one depth, whose Trie.node_start is given; first and stop are
        int [t], and nodes are counted from first.
        """
        inside = (
            (self.positions >= node_start[first][:, None])
            & (self.positions < node_start[stop][:, None])
            & (self.scores > -np.inf)
        )
        cells = np.full(self.positions.shape, -1, np.int64)
        row, _ = np.nonzero(inside)
        nodes = np.searchsorted(node_start, self.positions[inside], side="right") - 1
        cells[inside] = nodes - first[row]
        return cells


def scan_catalogue(
    scorer: ItemScorer,
    queries: torch.Tensor,
    targets: np.ndarray,
    layout: RewardLayout,
    first: np.ndarray,
    deeper: np.ndarray,
) -> None:
    """All depths of a small catalogue from one product.

    Writes log Σ exp(score) below each first code into the rows `targets` of first
    float32 [T, codes], and the children's shares of the targets' deeper prefixes into
    deeper at `RewardLayout.output_indices`. queries fp32 [t, d] and targets int64 [t]
    belong together.
    """
    n, starts = layout.trie.catalogue.num_items, layout.trie.node_start[1][:-1]
    step = max(1, CHUNK_ELEMENTS // n)
    buffer = torch.empty(min(step, len(targets)), n)
    for begin in range(0, len(targets), step):
        chunk = targets[begin : begin + step]
        scores = buffer[: len(chunk)]
        scorer.scores(queries[begin : begin + step], 0, n, scores)
        if layout.trie.depth > 1:
            low, high = layout.code_ranges(1, chunk)
            ranges = ragged_ranges(np.arange(len(chunk)) * n + low, high - low)
            base = np.ones(len(chunk), np.int64)
            _write_shares(scores.numpy().ravel()[ranges], chunk, low, high, base, layout, deeper)
        row_max = scores.amax(1, keepdim=True)
        row_max.masked_fill_(torch.isneginf(row_max), 0)
        mass = np.add.reduceat(scores.sub_(row_max).exp_().numpy(), starts, axis=1)
        with np.errstate(divide="ignore"):
            first[chunk] = np.log(mass) + row_max.numpy()


def first_log_masses(
    scorer: ItemScorer,
    queries: torch.Tensor,
    targets: np.ndarray,
    layout: RewardLayout,
    out: np.ndarray,
    options: RewardOptions,
) -> list[ScoredItems]:
    """Depth 0 of a large catalogue: log Σ exp(score) below each first code held.

    Written into the rows `targets` of out float32 [T, codes]. Returns the items that
    were scored one by one, per shard and for all `targets`.
    """
    assert scorer.large is not None
    column = 0
    scored_by_shard = []
    for (first, stop), known, index in zip(
        scorer.large.shards, scorer.large.known, scorer.large.indexes, strict=True
    ):
        scored = _top_items(scorer, index, known, queries, layout.code_position[targets], options)
        scored_by_shard.append(scored)
        for begin in range(0, len(targets), FIRST_ROWS):
            chunk = slice(begin, begin + FIRST_ROWS)
            items = scored.select(chunk)
            moments = scorer.large.moments[0].scores(first, stop, queries[chunk])
            rows = len(items.cap)
            cells = items.cells(
                layout.trie.node_start[1], np.full(rows, first), np.full(rows, stop)
            )
            out[targets[chunk], column : column + stop - first] = log_masses(
                *moments, cells, items.scores, items.cap
            )
        column += stop - first
    return scored_by_shard


def _top_items(
    scorer: ItemScorer,
    index: Any,
    known: np.ndarray,
    queries: torch.Tensor,
    targets: np.ndarray,
    options: RewardOptions,
) -> ScoredItems:
    """The top items of each query in an index, and its target, scored exactly.

    targets int64 [t]: their code-order positions. The cap is the k-th largest score of
    the k + k/4 items that were fetched: an index of rough codes misses items that score
    as high as the last it returns.
    """
    extra = options.top_k // 4
    ids = search_ann_index(index, queries.numpy(), options.top_k + extra, options.width)
    # In code order: neighbours in memory are read in turn.
    positions = np.sort(np.where(ids >= 0, known[ids], -1), axis=1).astype(np.int64)
    exists = positions >= 0
    missing = ~(positions == targets[:, None]).any(1)
    positions = np.concatenate([positions, np.where(missing, targets, -1)[:, None]], axis=1)
    scores = scorer.scores_at(queries, torch.from_numpy(np.maximum(positions, 0))).numpy()
    scores[positions < 0] = -np.inf
    last = extra if ids.shape[1] > options.top_k else 0
    cap = np.partition(np.where(exists, scores[:, :-1], np.inf), last, axis=1)[:, last]
    return ScoredItems(positions, scores, cap)


def deeper_shares(
    scorer: ItemScorer,
    queries: torch.Tensor,
    targets: np.ndarray,
    layout: RewardLayout,
    scored_by_shard: list[ScoredItems],
    out: np.ndarray,
    options: RewardOptions,
) -> None:
    """Depths 1 … of a large catalogue: each child's share of the target's prefix.

    Written into out at `RewardLayout.output_indices`; `scored_by_shard` is what
    `first_log_masses` returned, for these targets. One scan of the target's longest
    prefix of at most `prefix_items` items serves that depth and all below; the depths
    above it are estimated.
    """
    depth = layout.trie.depth
    # The depth of the prefix that is scanned.
    base = np.ones(len(targets), np.int64)
    for level in range(1, depth):
        low, high = layout.code_ranges(level, targets)
        long = high - low > options.prefix_items
        base[long] = level + 1
        rows = np.flatnonzero(long)
        _estimate_level(scorer, queries, targets, rows, level, layout, scored_by_shard, out)
    rows = np.flatnonzero(base < depth)
    rows = rows[np.argsort(layout.code_position[targets[rows]], kind="stable")]
    start, stop = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for level in np.unique(base[rows]):
        here = base[rows] == level
        start[here], stop[here] = layout.code_ranges(level, targets[rows[here]])
    for chunk in _chunks(stop - start):
        _scan_prefixes(
            scorer,
            queries,
            targets,
            rows[chunk],
            start[chunk],
            stop[chunk],
            base[rows[chunk]],
            layout,
            out,
        )


def _scan_prefixes(
    scorer: ItemScorer,
    queries: torch.Tensor,
    targets: np.ndarray,
    rows: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    base: np.ndarray,
    layout: RewardLayout,
    out: np.ndarray,
) -> None:
    """Scan [low, high) for each of `rows` and write its depths from `base` on.

    rows int64 index targets and queries, and are in code order; one product per range.
    """
    # Where each row's scores begin in the flat buffer.
    begin = np.cumsum(high - low) - (high - low)
    flat = torch.empty(int((high - low).sum()))
    groups = np.flatnonzero(np.diff(low, prepend=-1))
    row_queries = queries[torch.from_numpy(rows)]
    for first, last in zip(groups, np.append(groups[1:], len(rows)), strict=True):
        width = int(high[first] - low[first])
        block = flat[begin[first] : begin[first] + width * (last - first)].view(last - first, width)
        scorer.scores(row_queries[first:last], int(low[first]), int(high[first]), block)
    _write_shares(flat.numpy(), targets[rows], low, high, base, layout, out)


def _write_shares(
    scores: np.ndarray,
    targets: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    base: np.ndarray,
    layout: RewardLayout,
    out: np.ndarray,
) -> None:
    """The children's shares of each target's prefixes of depth `base` and below.

    From the scores of the ranges [low, high) of all targets, concatenated.
    """
    begin = np.cumsum(high - low) - (high - low)
    for level in range(int(base.min()), layout.trie.depth):
        here = np.flatnonzero(base <= level)
        chosen = targets[here]
        inner_low, inner_high = layout.code_ranges(level, chosen)
        size = inner_high - inner_low
        if len(here) == len(targets) and bool((size == high - low).all()):
            inner = scores
        else:
            inner = scores[ragged_ranges(begin[here] + inner_low - low[here], size)]
        children = layout.num_children[level, chosen]
        shares = child_shares(inner, size, layout.child_lengths(level, chosen), children)
        out[layout.output_indices(level, chosen)] = shares


def _estimate_level(
    scorer: ItemScorer,
    queries: torch.Tensor,
    targets: np.ndarray,
    rows: np.ndarray,
    level: int,
    layout: RewardLayout,
    scored_by_shard: list[ScoredItems],
    out: np.ndarray,
) -> None:
    """Estimate the shares of the children of long prefixes of one depth.

    rows int64 index targets and queries. The items scored for the first code count one
    by one, the others by the children's moments.
    """
    assert scorer.large is not None
    starts = np.array([shard[0] for shard in scorer.large.shards])
    shard_of = np.searchsorted(starts, layout.first_node[targets[rows]], side="right") - 1
    for shard, scored in enumerate(scored_by_shard):
        # Targets of one prefix stand side by side.
        in_shard = rows[shard_of == shard]
        nodes = layout.nodes[level, targets[in_shard]]
        in_shard = in_shard[np.argsort(nodes, kind="stable")]
        for begin in range(0, len(in_shard), DEEPER_ROWS):
            here = in_shard[begin : begin + DEEPER_ROWS]
            _estimate_shares(
                scorer.large.moments[level],
                queries[torch.from_numpy(here)],
                targets[here],
                level,
                layout,
                scored.select(here),
                out,
            )


def _estimate_shares(
    moments: CellMoments,
    queries: torch.Tensor,
    targets: np.ndarray,
    level: int,
    layout: RewardLayout,
    scored: ScoredItems,
    out: np.ndarray,
) -> None:
    """Write the estimates of targets, which are in the order of their prefixes."""
    first, children = layout.first_child[level, targets], layout.num_children[level, targets]
    shape = (len(targets), int(children.max()))
    count, mean, variance = (np.zeros(shape, np.float32) for _ in range(3))
    ends = np.append(np.flatnonzero(np.diff(first)) + 1, len(targets))
    for low, high in zip(np.append(0, ends[:-1]), ends, strict=True):
        group, width, node = slice(low, high), int(children[low]), int(first[low])
        count[group, :width], mean[group, :width], variance[group, :width] = moments.scores(
            node, node + width, queries[group]
        )
    cells = scored.cells(layout.trie.node_start[level + 1], first, first + children)
    logs = log_masses(count, mean, variance, cells, scored.scores, scored.cap)
    inside = np.arange(count.shape[1]) < children[:, None]
    shares = softmax_rows(np.where(inside, logs, -np.inf))[inside]
    out[layout.output_indices(level, targets)] = shares


def _chunks(sizes: np.ndarray) -> Iterator[slice]:
    """Consecutive slices of about CHUNK_ELEMENTS in all, at least one row each."""
    chunk_of = (np.cumsum(sizes) - sizes) // CHUNK_ELEMENTS
    bounds = np.append(np.flatnonzero(np.diff(chunk_of, prepend=-1)), len(sizes))
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        yield slice(first, last)
