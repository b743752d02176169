"""The `torch` backend: chunks of rows under a fixed workspace, gradients made in forward, any device, vocabulary-parallel (METHOD.md §7)."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ilrec_kernels.exchange import Exchange
from ilrec_kernels.gradients import add_gradients
from ilrec_kernels.logits import start_chunk
from ilrec_kernels.merge import merge
from ilrec_kernels.negatives import target_ensemble
from ilrec_kernels.normalisers import collect_statistics
from ilrec_kernels.pairs import lists_hold_targets
from ilrec_kernels.problem import Problem, chunk_spans, make_plan
from ilrec_kernels.state import Chunk, Gradients, Scratch
from ilrec_kernels.types import RowStats


def run(p: Problem, gradients: Gradients | None) -> RowStats:
    """Compute the rows' losses and statistics and, if asked, add the gradients. See api.cross_layer_loss."""
    plan = make_plan(p)
    m = len(p.hidden) - 1
    out = empty_stats(p.n, m, p.dtype, p.targets.device)
    early = (
        target_ensemble(p, plan)
        if p.options.needs_negatives and (p.group is not None or (plan.sliced and plan.gated))
        else None
    )
    spans = chunk_spans(p, plan)
    complete = (
        lists_hold_targets(p.candidates, p.targets, spans)
        if plan.pairs and p.candidates is not None
        else [True] * len(spans)
    )
    scratches = Scratch.make(p, plan, min(plan.under_way, len(spans)))
    waiting: deque[tuple[Chunk, Exchange]] = deque()

    def finish() -> None:
        chunk, exchange = waiting.popleft()
        merged = merge(p, plan, chunk.pairs, exchange.wait(), chunk.begin, chunk.end, write=out)
        if gradients is not None:
            add_gradients(p, plan, chunk, merged, gradients)

    for i, span in enumerate(spans):
        chunk = start_chunk(p, plan, scratches[i % plan.under_way], span, complete[i])
        collect_statistics(p, plan, chunk, None if early is None else early[span.begin : span.end])
        assert chunk.stats is not None
        waiting.append((chunk, Exchange(chunk.stats, chunk.sent, p)))
        if (
            len(waiting) == plan.under_way
        ):  # its exchange went on while this chunk's logits were made
            finish()
    while waiting:
        finish()
    if gradients is not None and gradients.head is not None and p.trainable is not None:
        frozen = torch.ones(p.head.shape[0], dtype=torch.bool, device=p.head.device)
        frozen[p.trainable.rows(frozen.device)] = (
            False  # the lists' products do not look at which rows train
        )
        gradients.head.masked_fill_(frozen[:, None], 0.0)
    return out


def empty_stats(n: int, m: int, float_dtype: torch.dtype, device: torch.device) -> RowStats:
    def zeros(*shape: int, dtype: torch.dtype = float_dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    flag = torch.bool
    return RowStats(
        cpo=zeros(n), cpd=zeros(n), crr=zeros(n), kl=zeros(m, n), num_negatives=zeros(n), capped=zeros(n, dtype=flag),
        valid_next_negatives=zeros(n), p_target=zeros(n), covered=zeros(n, dtype=flag), negatives_key=zeros(n, dtype=torch.int64),
    )  # fmt: skip
