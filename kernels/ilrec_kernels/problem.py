"""One call of the operator, validated, and the plan of how to compute it: which columns are dense, what is ragged, how many rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels.columns import Columns, dense_columns
from ilrec_kernels.types import Backend, LossOptions, TokenLists, compute_dtype

MIB = 1 << 20
SMALL_CHUNK = 1536  # stacked rows (rows × streams) under which regime T's products are bound by reading the head


@dataclass(frozen=True)
class Problem:
    """The inputs of a call. `scale` [N] multiplies each row's loss in the gradients."""

    hidden: tuple[Tensor, ...]  # final first, then L−1 … L−m; each [N, d]
    head: Tensor  # [V_local, d]
    targets: Tensor  # int64 [N], global
    candidates: TokenLists | None
    rewards: Tensor | None  # [nnz]
    options: LossOptions
    start: int  # the shard owns global tokens [start, stop); without padding
    stop: int
    group: dist.ProcessGroup | None  # None where there is one shard
    trainable: Columns | None  # local head rows with a gradient; None: all

    @property
    def n(self) -> int:
        return self.targets.numel()

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.hidden[0])


@dataclass(frozen=True)
class Plan:
    """How the call is computed. A scope is either dense columns or, as None, the rows' ragged lists (valid_next)."""

    streams: int  # how many of the hidden tensors take part
    final: Columns | None  # columns of which the final layer's logits are made
    layers: Columns | None  # and the intermediate layers'
    softmax: bool  # dense cross-entropy (over `final`), else over the lists
    distill: Columns | None  # within `layers`
    negatives: Columns | None  # within `layers` (within `final` for negatives_from final)
    ragged_distill: bool
    ragged_negatives: bool
    pairs: bool  # the lists are needed
    rows: int  # rows of a chunk
    under_way: int  # chunks whose logits are held at once: with other ranks two, so that one's exchange goes on during the other's products
    pair_budget: int  # list entries of a chunk
    block: int  # head rows upcast at a time
    tile: int  # elements that the passes over the logits work on at a time: what stays in a core's cache
    budget: int  # bytes for small temporaries
    fused: bool  # Triton's row kernels go over the dense logits
    sliced: bool  # regime V
    slice_columns: int  # columns of a slice in regime V's backward

    @property
    def logits(self) -> int:
        """How many logits a row has, over all streams."""
        return _len(self.final) + (self.streams - 1) * _len(self.layers)

    @property
    def spare(self) -> int:
        """How many values a row needs besides its logits: first z̄, then the teacher's exponentials."""
        return 0 if self.fused else max(_len(self.distill), _len(self.negatives))

    def tiles(self, rows: int, columns: int) -> Iterator[slice]:
        """Ranges of rows that are one tile each."""
        step = max(1, self.tile // max(1, columns))
        return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def _len(columns: Columns | None) -> int:
    return 0 if columns is None else len(columns)


def workspace_bytes(options: LossOptions, device: torch.device) -> int:
    if options.workspace_bytes is not None:
        return options.workspace_bytes
    return 64 * MIB if device.type == "cpu" else 1024 * MIB


def widest(scopes: list[Columns | None], everything: Columns) -> Columns | None:
    """The columns that hold all of these scopes, of which there are two at most: all tokens and item tokens."""
    dense = [c for c in scopes if c is not None]
    return everything if any(c is everything for c in dense) else (dense[0] if dense else None)


def shares(total: int, lists: int, logits: bool) -> tuple[int, int]:
    """(bytes for the rows' matrices of logits and vectors, bytes for their lists) of a workspace; `lists` is what all rows' lists would take."""
    if not logits:
        return total * 3 // 8, total // 2
    return max(total * 3 // 4, total * 7 // 8 - min(lists, total // 4)), total // 4  # few lists leave their share to the logits


def make_plan(p: Problem) -> Plan:
    o = p.options
    everything, items = (dense_columns(scope, o, p.start, p.stop) for scope in ("all", "item_tokens"))
    dense = {"all": everything, "item_tokens": items}
    cpd = o.mu > 0
    from_layers = o.needs_negatives and o.negatives_from == "intermediate"
    streams = len(p.hidden) if cpd or from_layers else 1
    distill = dense.get(o.distill_scope) if cpd else None
    negatives = dense.get(o.negative_scope) if o.needs_negatives else None
    softmax = o.softmax_scope == "all"
    layers = widest([distill, negatives if from_layers else None], everything)
    final = everything if softmax else widest([distill, negatives], everything)
    if softmax and layers is not None and layers.index is None and len(layers) * 8 >= len(everything) * 7:
        layers = everything  # one product for all streams is cheaper than leaving a few columns out
    # the lists are also consulted for statistics when negatives are drawn from elsewhere
    pairs = p.candidates is not None and (o.needs_candidates or o.needs_negatives)

    slices = (distill is None or distill.index is None) and (layers is None or layers.index is None)
    fused = o.backend is Backend.TRITON and slices and (softmax or distill is not None)

    d, size = p.hidden[0].shape[1], torch.finfo(p.dtype).bits // 8
    total = workspace_bytes(o, p.head.device)
    pair_bytes = 48 + 3 * streams * size
    listed = p.candidates.tokens.numel() if pairs and p.candidates is not None else 0
    row_share, list_share = shares(total, listed * pair_bytes, final is not None or layers is not None)
    block = p.head.shape[0]
    if p.head.dtype != p.dtype and not p.head.is_cuda:
        block = max(1, min(block, total // 8 // (d * size)))
    plan = Plan(
        streams, final, layers, softmax, distill, negatives, cpd and distill is None, o.needs_negatives and negatives is None, pairs,
        rows=max(1, p.n), under_way=1, pair_budget=max(1, list_share // pair_bytes), block=block,
        tile=min(1 << 18, total // 8 // (2 * size)) if not p.head.is_cuda else total // 8 // (2 * size),
        budget=total // 8, fused=fused, sliced=False, slice_columns=0,
    )  # fmt: skip
    width = plan.logits + plan.spare + (2 if plan.logits else 3) * streams * d + 64
    if fused:
        width += _len(final) // 4 + 2 * 260  # a byte a column marks what was sent; the gate's lists
    rows = max(1, row_share // (width * size))
    if p.group is not None:  # shards may differ in size; every rank must cut the rows alike
        agreed = torch.tensor(rows, device=p.head.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=p.group)
        rows = int(agreed)
    halves = p.group is not None and 1 < rows < p.n
    # regime V where a chunk would be small although there are many rows; it knows lists of negatives and dense distillation
    supported = fused and softmax and negatives is None and not (cpd and distill is None) and p.trainable is None and p.head.requires_grad and d % 16 == 0
    supported = supported and not isinstance(o.item_tokens, Tensor)  # ranks must choose alike, and a list may be a slice on some of them
    sliced = supported and rows * streams < SMALL_CHUNK <= p.n * streams
    slice_columns = total // 2 // max(1, p.n * streams * size) if sliced else 0
    if sliced:
        rows = p.n
    elif halves:
        plan = replace(plan, under_way=2, pair_budget=max(1, plan.pair_budget // 2))
        rows //= 2
    rows = min(max(1, p.n), rows)
    rows = -(-p.n // -(-p.n // rows)) if p.n else 1  # chunks of equal size
    return replace(plan, rows=rows, sliced=sliced, slice_columns=slice_columns)


def chunk_bounds(p: Problem, plan: Plan) -> list[tuple[int, int]]:
    """Consecutive row ranges within the plan's limits of rows and list entries."""
    starts = list(range(0, p.n, plan.rows))
    bounds = [(s, min(s + plan.rows, p.n)) for s in starts]
    if not plan.pairs:
        return bounds
    assert p.candidates is not None
    edges = p.candidates.indptr
    out: list[tuple[int, int]] = []
    totals = (edges[[e for _, e in bounds]] - edges[starts]).tolist() if bounds else []
    for (begin, end), nnz in zip(bounds, totals, strict=True):
        while nnz > plan.pair_budget and begin < end:
            limit = int(torch.searchsorted(edges, edges[begin] + plan.pair_budget, right=True)) - 1
            cut = min(max(begin + 1, limit), end)
            out.append((begin, cut))
            nnz -= int(edges[cut] - edges[begin])
            begin = cut
        if begin < end:
            out.append((begin, end))
    return out
