"""The plan of how to compute a call: how many rows at a time, and in which memory.

docs/kernel.md (Roofline) gives the reasons for the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels.layout.candidate_entries import Span
from ilrec_kernels.options import LossOptions
from ilrec_kernels.problem import DenseSource, Problem, Terms, call_terms
from ilrec_kernels.triton.candidate_buffer import BUFFER_SIZE

MIB = 1 << 20
# Stacked rows (rows × streams) of a chunk under which the products of regime T are bound
# by reading the head and its gradient.
SMALL_CHUNK = 768
# Tiles in which candidates are looked for at once.
CANDIDATE_TILES = 4
# The least number of columns of a slice in regime V, where rows can make room for them.
MIN_SLICE_COLUMNS = 512
# A slice has a multiple of so many columns.
SLICE_STEP = 128


@dataclass(frozen=True)
class Plan(Terms):
    """How the call is computed: the terms, and the sizes that keep to the workspace.

    chunk_rows        rows of a chunk
    chunk_entries     list entries of a chunk
    chunks_in_flight  chunks kept in memory at once: 2 under tensor parallelism, where
                      chunk i's all-gather overlaps chunk i + 1's product, otherwise 1
    block             head rows gathered or upcast at a time
    tile              elements that a pass over the logits works on at a time: what
                      stays in a core's cache
    budget            bytes for small temporaries
    slice_columns     columns of a slice in regime V
    """

    chunk_rows: int
    chunk_entries: int
    chunks_in_flight: int
    block: int
    tile: int
    budget: int
    slice_columns: int

    def tiles(self, rows: int, columns: int, count: int = 1) -> Iterator[slice]:
        """Yield ranges of rows that are about `count` tiles each."""
        step = max(1, count * self.tile // max(1, columns))
        return (slice(i, min(i + step, rows)) for i in range(0, rows, step))

    @property
    def scratch_values(self) -> int:
        """Values of the memory for a few tiles: z̄ for the candidates, then the
        teacher.
        """
        return _scratch_values(self, self.tile)


def make_plan(p: Problem) -> Plan:
    """Plan a call. With a group it agrees with the other ranks: every rank
    must call.
    """
    terms = call_terms(p)
    size, gpu = torch.finfo(p.dtype).bits // 8, p.head.is_cuda
    total = workspace_bytes(p.options, p.head.device)
    any_dense = terms.final.is_dense or terms.layers.is_dense
    budget = total // (12 if any_dense else 4)
    tile = budget // (2 * size)
    if not gpu:
        tile = min(1 << 18, tile)
    # The rest is for what allocators and BLAS take; it is more on a CPU.
    room = min(total - budget, total * 7 // 8 if gpu else total * 5 // 6)
    room -= _scratch_values(terms, tile) * size
    row_entries = 0.0
    if terms.needs_entries and p.candidates is not None:
        row_entries = p.candidates.tokens.numel() / max(1, p.n)
    list_bytes = row_entries * _entry_bytes(terms, size)
    rows = max(1, int(room // (_row_bytes(p, terms, size) + list_bytes)))

    # In regime V a row takes this, and so much for each column of a slice.
    row_bytes = _hidden_bytes(p, terms, size) + 64 * size + list_bytes
    if terms.kernel_finds_negatives:
        row_bytes += _buffer_bytes(p, size)
    column_bytes = terms.streams * size + 1
    sliced_rows = 1
    if _can_slice(p, terms):
        narrow = min(MIN_SLICE_COLUMNS, len(terms.final))
        sliced_rows = max(1, int(room // (row_bytes + column_bytes * narrow)))
    if p.group is not None:
        # Shards may differ in size, and every rank must cut the rows alike.
        agreed = torch.tensor([rows, sliced_rows], device=p.head.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=p.group)
        rows, sliced_rows = agreed.tolist()

    streams, slice_columns, chunks_in_flight = terms.streams, 0, 1
    if (
        _can_slice(p, terms)
        and rows * streams < SMALL_CHUNK <= p.n * streams
        and rows < sliced_rows
    ):
        terms = replace(terms, source=DenseSource.SLICES)
        rows = _equal_chunks(p.n, sliced_rows)
        columns = int((room / rows - row_bytes) // column_bytes)
        slice_columns = max(SLICE_STEP, columns // SLICE_STEP * SLICE_STEP)
    else:
        if p.group is not None and 1 < rows < p.n:
            chunks_in_flight = 2
        rows = _equal_chunks(p.n, max(1, rows // chunks_in_flight))
    return Plan(
        **vars(terms),
        chunk_rows=rows,
        chunk_entries=int(rows * row_entries * 9 / 8) + 1,
        chunks_in_flight=chunks_in_flight,
        block=_block_rows(p, terms, budget, size),
        tile=tile,
        budget=budget,
        slice_columns=slice_columns,
    )


def chunk_spans(p: Problem, plan: Plan) -> list[Span]:
    """Cut the rows into consecutive spans within the plan's rows and list entries."""
    if not plan.needs_entries or p.candidates is None:
        step = plan.chunk_rows
        return [Span(begin, min(begin + step, p.n)) for begin in range(0, p.n, step)]
    edges = p.candidates.indptr.cpu()
    spans: list[Span] = []
    begin = low = 0
    while begin < p.n:
        limit = int(torch.searchsorted(edges, low + plan.chunk_entries, right=True)) - 1
        end = min(begin + plan.chunk_rows, p.n, max(begin + 1, limit))
        high = int(edges[end])
        spans.append(Span(begin, end, low, high))
        begin, low = end, high
    return spans


def workspace_bytes(options: LossOptions, device: torch.device) -> int:
    if options.workspace_bytes is not None:
        return options.workspace_bytes
    return 64 * MIB if device.type == "cpu" else 1024 * MIB


def _equal_chunks(n: int, rows: int) -> int:
    """Return the rows of a chunk, at most `rows`, so that all chunks are
    about equal.
    """
    rows = min(max(1, n), rows)
    return -(-n // -(-n // rows)) if n else 1


def _can_slice(p: Problem, terms: Terms) -> bool:
    """Whether regime V knows how to compute this call.

    Ranks must choose alike, and scattered item
    tokens may be consecutive on some of them.
    """
    return (
        terms.uses_kernels
        and terms.softmax.is_dense
        and (not terms.negatives.is_dense or terms.kernel_finds_negatives)
        and not terms.distill.is_lists
        and p.trainable is None
        and p.head.requires_grad
        and not isinstance(p.options.item_tokens, Tensor)
        and all(h.dtype == p.head.dtype for h in p.hidden)
    )


def _block_rows(p: Problem, terms: Terms, budget: int, size: int) -> int:
    """Return how many head rows may be gathered or upcast at a time."""
    rows = max(1, p.head.shape[0])
    scopes = (terms.final, terms.layers, terms.distill)
    upcast = p.head.dtype != p.dtype and not p.head.is_cuda
    if upcast or any(scope.columns.is_scattered for scope in scopes):
        width = p.hidden[0].shape[1] * (size + p.head.element_size())
        rows = max(1, min(rows, budget // width))
    return rows


def _scratch_values(terms: Terms, tile: int) -> int:
    negatives = 0 if terms.kernel_finds_negatives else len(terms.negatives)
    width = max(negatives, len(terms.distill) if terms.final_is_teacher else 0)
    return max(width, CANDIDATE_TILES * tile) if width else 0


def _row_bytes(p: Problem, terms: Terms, size: int) -> int:
    """Return what a row of a chunk takes in regime T, besides its list."""
    logits = (terms.row_logits + terms.row_teacher) * size
    if terms.kernel_finds_negatives:
        logits += _buffer_bytes(p, size)
    elif terms.uses_kernels:
        # A byte a column marks which candidates the normaliser leaves out.
        logits += len(terms.final)
    elif p.head.is_cuda and p.head.dtype != p.dtype:
        # The gradients are rounded for the products.
        logits += terms.row_logits * p.head.element_size()
    return logits + _hidden_bytes(p, terms, size) + 64 * size


def _buffer_bytes(p: Problem, size: int) -> int:
    """Return what a row's candidate buffer takes, with its k entries in
    several forms.
    """
    return BUFFER_SIZE * (size + 4) + (p.options.max_negatives + 10) * 150


def _hidden_bytes(p: Problem, terms: Terms, size: int) -> int:
    """Return what a row's hidden rows and their gradient take.

    On a CPU a block's share of the gradient exists by itself before it is added.
    """
    copies = 1 if p.head.is_cuda else 2
    return terms.streams * p.hidden[0].shape[1] * (p.row_dtype.itemsize + copies * size)


def _entry_bytes(terms: Terms, size: int) -> int:
    """Return what a list's entry takes: its indices, and its logits in
    several copies.
    """
    if terms.distill.is_lists or terms.softmax.is_lists:
        return 104 + 4 * terms.streams * size
    return 64 + 3 * terms.streams * size if terms.negatives.is_lists else 48
