"""One call of the operator, validated, and the plan of how to compute it: which columns are dense, what is ragged, how many rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels.columns import Columns, dense_columns
from ilrec_kernels.types import Backend, LossOptions, TokenLists, compute_dtype

MIB = 1 << 20
SMALL_CHUNK = 768  # stacked rows (rows × streams) under which regime T's products are bound by the head and its gradient (docs/kernel.md, Roofline)
TILES = 4  # tiles that candidates are looked for in at once
SLICE = 512  # columns that a slice of regime V has at least, where rows can make room for them
SLICE_STEP = 128  # of which it has a multiple


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

    @property
    def row_dtype(self) -> torch.dtype:
        """Of the hidden rows that the products take: on a GPU their own, where it is the head's."""
        return (
            self.head.dtype
            if self.head.is_cuda and all(h.dtype == self.head.dtype for h in self.hidden)
            else self.dtype
        )


class Span(NamedTuple):
    """Rows [begin, end) of a call and, where it has lists, their entries [low, high)."""

    begin: int
    end: int
    low: int = 0
    high: int = 0


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
    block: int  # head rows gathered or upcast at a time
    tile: int  # elements that the passes over the logits work on at a time: what stays in a core's cache
    budget: int  # bytes for small temporaries
    fused: bool  # Triton's row kernels go over the dense logits
    shared: bool  # the final layer's exponentials are the teacher's too
    sliced: bool  # regime V
    slice_columns: int  # columns of a slice in regime V

    @property
    def logits(self) -> int:
        """How many logits a row has, over all streams."""
        return _len(self.final) + (self.streams - 1) * _len(self.layers)

    @property
    def teacher(self) -> int:
        """How many values a row needs besides its logits: the teacher's exponentials, where they are kept by themselves."""
        return 0 if self.fused or self.shared else _len(self.distill)

    @property
    def desk(self) -> int:
        """Values of the memory that a few tiles are worked on in: z̄ while candidates are looked for, then the teacher."""
        wide = max(
            0 if self.gated else _len(self.negatives), _len(self.distill) if self.shared else 0
        )
        return max(wide, TILES * self.tile) if wide else 0

    @property
    def gated(self) -> bool:
        """Dense candidates are found by the kernel that makes the statistics."""
        return self.fused and self.negatives is not None and self.negatives.index is None

    def tiles(self, rows: int, columns: int, times: int = 1) -> Iterator[slice]:
        """Ranges of rows that are so many tiles each."""
        step = max(1, times * self.tile // max(1, columns))
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


def make_plan(p: Problem) -> Plan:
    o = p.options
    everything, items = (
        dense_columns(scope, o, p.start, p.stop) for scope in ("all", "item_tokens")
    )
    dense = {"all": everything, "item_tokens": items}
    cpd = o.mu > 0
    from_layers = o.needs_negatives and o.negatives_from == "intermediate"
    streams = len(p.hidden) if cpd or from_layers else 1
    distill = dense.get(o.distill_scope) if cpd else None
    negatives = dense.get(o.negative_scope) if o.needs_negatives else None
    softmax = o.softmax_scope == "all"
    layers = widest([distill, negatives if from_layers else None], everything)
    final = everything if softmax else widest([distill, negatives], everything)
    if (
        softmax
        and layers is not None
        and layers.index is None
        and len(layers) * 8 >= len(everything) * 7
    ):
        layers = everything  # one product for all streams is cheaper than leaving a few columns out
    # the lists are also consulted for statistics when negatives are drawn from elsewhere
    pairs = p.candidates is not None and (o.needs_candidates or o.needs_negatives)

    slices = (distill is None or distill.index is None) and (layers is None or layers.index is None)
    fused = o.backend is Backend.TRITON and slices and (softmax or distill is not None)

    total = workspace_bytes(o, p.head.device)
    budget = total // (4 if final is None and layers is None else 12)
    d, size, gpu = p.hidden[0].shape[1], torch.finfo(p.dtype).bits // 8, p.head.is_cuda
    block = max(1, p.head.shape[0])
    if any(c is not None and c.index is not None for c in (final, layers, distill)) or (
        p.head.dtype != p.dtype and not gpu
    ):
        block = max(1, min(block, budget // (d * (size + p.head.element_size()))))
    plan = Plan(
        streams, final, layers, softmax, distill, negatives, cpd and distill is None, o.needs_negatives and negatives is None, pairs,
        rows=max(1, p.n), under_way=1, pair_budget=0, block=block, tile=budget // (2 * size) if gpu else min(1 << 18, budget // (2 * size)),
        budget=budget, fused=fused, shared=not fused and softmax and distill is not None and distill.same(final), sliced=False, slice_columns=0,
    )  # fmt: skip
    listed = (
        p.candidates.tokens.numel() / max(1, p.n) if pairs and p.candidates is not None else 0.0
    )  # entries of a row, in the mean
    lists = listed * pair_bytes(plan, size)
    room = min(
        total - budget, total * 7 // 8 if gpu else total * 5 // 6
    )  # the rest is for what allocators and BLAS take; more of it on a CPU
    room -= plan.desk * size
    rows = max(1, int(room // (row_bytes(p, plan, size) + lists)))
    # regime V where a chunk would be small although there are many rows; it knows dense distillation
    supported = (
        fused and softmax and (negatives is None or plan.gated) and not (cpd and distill is None)
    )
    supported = supported and p.trainable is None and p.head.requires_grad
    supported = supported and not isinstance(
        o.item_tokens, Tensor
    )  # ranks must choose alike, and a list may be a slice on some of them
    supported = supported and all(h.dtype == p.head.dtype for h in p.hidden)
    whole = (
        hidden_bytes(p, plan, size) + 64 * size + lists + (list_bytes(p, size) if plan.gated else 0)
    )  # bytes of a row
    slice_row = streams * size + 1  # and of it for each column of a slice
    sliced_rows = (
        max(1, int(room // (whole + slice_row * min(SLICE, _len(final))))) if supported else 1
    )
    if p.group is not None:  # shards may differ in size; every rank must cut the rows alike
        agreed = torch.tensor([rows, sliced_rows], device=p.head.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=p.group)
        rows, sliced_rows = agreed.tolist()
    sliced = supported and rows * streams < SMALL_CHUNK <= p.n * streams and rows < sliced_rows
    under_way = 2 if p.group is not None and 1 < rows < p.n and not sliced else 1
    rows = min(max(1, p.n), sliced_rows if sliced else max(1, rows // under_way))
    rows = -(-p.n // -(-p.n // rows)) if p.n else 1  # chunks of equal size
    slice_columns = (
        max(SLICE_STEP, int((room / rows - whole) // slice_row) // SLICE_STEP * SLICE_STEP)
        if sliced
        else 0
    )
    return replace(
        plan,
        rows=rows,
        under_way=under_way,
        pair_budget=int(rows * listed * 9 / 8) + 1,
        sliced=sliced,
        slice_columns=slice_columns,
    )


def row_bytes(p: Problem, plan: Plan, size: int) -> int:
    """What a row of a chunk takes in regime T, besides its list."""
    logits = (plan.logits + plan.teacher) * size
    if plan.fused:
        logits += (
            list_bytes(p, size) if plan.gated else _len(plan.final)
        )  # a byte a column marks what was sent
    elif p.head.is_cuda and p.head.dtype != p.dtype:
        logits += plan.logits * p.head.element_size()  # rounded for the products
    return logits + hidden_bytes(p, plan, size) + 64 * size


def list_bytes(p: Problem, size: int) -> int:
    """A row's gated candidates: the kernel's list of 512, and the wanted ones' values and indices in several forms."""
    return 512 * (size + 4) + (p.options.max_negatives + 10) * 150


def hidden_bytes(p: Problem, plan: Plan, size: int) -> int:
    """A row's hidden rows and their gradient; on a CPU also a block's share of that, before it is added."""
    return (
        plan.streams
        * p.hidden[0].shape[1]
        * (p.row_dtype.itemsize + (1 if p.head.is_cuda else 2) * size)
    )


def pair_bytes(plan: Plan, size: int) -> int:
    """What a list's entry takes: its indices, and a stream's logit several times over where they are made for the lists alone."""
    if plan.ragged_distill or not plan.softmax:
        return 104 + 4 * plan.streams * size
    return 64 + 3 * plan.streams * size if plan.ragged_negatives else 48


def chunk_spans(p: Problem, plan: Plan) -> list[Span]:
    """Consecutive rows within the plan's limits of rows and list entries."""
    edges = p.candidates.indptr.cpu() if plan.pairs and p.candidates is not None else None
    out: list[Span] = []
    begin = low = high = 0
    while begin < p.n:
        end = min(begin + plan.rows, p.n)
        if edges is not None:
            end = min(
                end,
                max(
                    begin + 1,
                    int(torch.searchsorted(edges, low + plan.pair_budget, right=True)) - 1,
                ),
            )
            high = int(edges[end])
        out.append(Span(begin, end, low, high))
        begin, low = end, high
    return out
