"""The chunked backends: rows under a fixed workspace, gradients made in forward.

Each chunk goes through logits, negatives, statistics, exchange, merge and gradients
(METHOD.md §7); the modules of `steps` are these steps, those of `sources` the ways in
which logits are made and used.
"""

from __future__ import annotations

from collections import deque

from ilrec_kernels.chunk import Chunk, Gradients, Scratch
from ilrec_kernels.layout.candidate_entries import spans_with_all_targets
from ilrec_kernels.options import RowStats
from ilrec_kernels.plan import Plan, chunk_spans, make_plan
from ilrec_kernels.problem import DenseSource, Problem
from ilrec_kernels.sources.candidate_lists import CandidateLists
from ilrec_kernels.sources.dense_torch import DenseTorch
from ilrec_kernels.sources.protocol import LogitSource
from ilrec_kernels.steps.gradients import add_gradients, zero_frozen_rows
from ilrec_kernels.steps.logits import make_dense_logits, start_chunk
from ilrec_kernels.steps.negatives import needs_ensemble_bound, target_ensemble
from ilrec_kernels.steps.tp_exchange import Exchange
from ilrec_kernels.steps.tp_merge import merge


def run(p: Problem, gradients: Gradients | None) -> RowStats:
    """Compute the rows' losses and statistics; add gradients unless they are None.

    Every rank of the group must call. See api.cross_layer_loss.
    """
    plan = make_plan(p)
    rows = RowStats.zeros(p.n, p.num_layers, p.dtype, p.targets.device)
    bound = target_ensemble(p, plan) if needs_ensemble_bound(p, plan) else None
    spans = chunk_spans(p, plan)
    complete = [True] * len(spans)
    if plan.needs_entries and p.candidates is not None:
        complete = spans_with_all_targets(p.candidates, p.targets, spans)
    scratches = Scratch.allocate(p, plan, min(plan.chunks_in_flight, len(spans)))
    in_flight: deque[tuple[Chunk, list[LogitSource], Exchange]] = deque()

    def finish_oldest() -> None:
        chunk, sources, exchange = in_flight.popleft()
        merged = merge(p, plan, chunk, exchange.wait(), rows)
        if gradients is not None:
            add_gradients(p, plan, chunk, sources, merged, gradients)

    for i, span in enumerate(spans):
        scratch = scratches[i % plan.chunks_in_flight]
        chunk = start_chunk(p, plan, scratch, span, complete[i], bound)
        sources = make_sources(p, plan, chunk)
        for source in sources:
            source.statistics(chunk)
        in_flight.append((chunk, sources, Exchange(chunk.stats, chunk.candidates, p)))
        # The oldest chunk's exchange went on while this chunk's logits were made.
        if len(in_flight) == plan.chunks_in_flight:
            finish_oldest()
    while in_flight:
        finish_oldest()
    if gradients is not None and gradients.head is not None:
        zero_frozen_rows(p, gradients.head)
    return rows


def make_sources(p: Problem, plan: Plan, chunk: Chunk) -> list[LogitSource]:
    """Make the chunk's logits; return their sources, that of the negatives first."""
    sources: list[LogitSource] = []
    stored = None
    if plan.source is DenseSource.TORCH:
        stored = make_dense_logits(p, plan, chunk)
        sources.append(DenseTorch(p, plan, stored))
    elif plan.source is not DenseSource.NONE:
        # Triton is optional, and reads TRITON_INTERPRET when kernels are defined.
        from ilrec_kernels.sources import dense_triton, vocab_slices

        if plan.source is DenseSource.SLICES:
            sources.append(vocab_slices.VocabSlices(p, plan))
        else:
            stored = make_dense_logits(p, plan, chunk)
            sources.append(dense_triton.DenseTriton(p, plan, stored))
    if any(scope.is_lists for scope in (plan.softmax, plan.distill, plan.negatives)):
        lists = CandidateLists(p, plan, chunk, stored)
        sources.insert(0 if plan.negatives.is_lists else len(sources), lists)
    return sources
