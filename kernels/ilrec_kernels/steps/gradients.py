"""From merged statistics to gradients of the hidden rows and the head (METHOD.md
§§3–5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels.chunk import Chunk, ChunkGradients, DistillFactors, Factors, Gradients
from ilrec_kernels.layout.head_gradient import HeadGradient
from ilrec_kernels.plan import Plan
from ilrec_kernels.problem import Problem
from ilrec_kernels.sources.protocol import LogitSource
from ilrec_kernels.steps.head_product import add_head_gradient
from ilrec_kernels.steps.tp_merge import Merged


def add_gradients(
    p: Problem,
    plan: Plan,
    chunk: Chunk,
    sources: Sequence[LogitSource],
    merged: Merged,
    out: Gradients,
) -> None:
    """Add the chunk's gradients to `out`.

    The hidden rows' gradient is summed over ranks
    while the products with the hidden rows run.
    """
    scale = out.scale[chunk.begin : chunk.end].to(p.dtype)
    factors = row_factors(p, plan, chunk, merged, scale)
    hidden = torch.zeros_like(chunk.x, dtype=p.dtype)
    gradients = ChunkGradients(hidden, out.head)
    products = [
        product for source in sources for product in source.backward(chunk, factors, gradients)
    ]
    reduction = None
    if p.group is not None:
        reduction = dist.all_reduce(hidden, group=p.group, async_op=True)
    if out.head is not None:
        for product in products:
            add_head_gradient(p, plan, product, out.head)
    if reduction is not None:
        reduction.wait()
    for gradient, target in zip(hidden, out.hidden, strict=False):
        if target is not None:
            target[chunk.begin : chunk.end] = gradient


def row_factors(p: Problem, plan: Plan, chunk: Chunk, merged: Merged, scale: Tensor) -> Factors:
    """Return what turns this rank's exponentials into gradients; `scale` [n]."""
    stats, terms = chunk.stats, merged.terms
    soft = p.options.crr_lambda * terms.has_negatives
    # The cross-entropy on adjusted logits, and the soft label's share of the plain p.
    final = scale * (
        torch.exp(stats.row_max - terms.log_adjusted)
        + soft * torch.exp(stats.row_max - terms.log_plain)
    )
    return Factors(
        final=final.masked_fill_(stats.row_max == -torch.inf, 0.0),
        target=-scale * (1 + soft * terms.target_label),
        candidates=merged.candidate_gradient(scale, p.options),
        distill=_distill_factors(p, plan, chunk, merged, scale),
    )


def _distill_factors(
    p: Problem, plan: Plan, chunk: Chunk, merged: Merged, scale: Tensor
) -> DistillFactors | None:
    """Return the factors of μ/m·(p^l − p^L)."""
    stats = chunk.stats
    if plan.streams == 1 or p.options.mu == 0:
        return None
    share = scale * (p.options.mu / (plan.streams - 1))
    teacher = -share * torch.exp(stats.teacher_max - merged.log_teacher)
    layer = share * torch.exp(stats.layer_max - merged.log_layer)
    return DistillFactors(
        teacher.masked_fill_(stats.teacher_max == -torch.inf, 0.0),
        layer.masked_fill_(stats.layer_max == -torch.inf, 0.0),
    )


def zero_frozen_rows(p: Problem, head_gradient: HeadGradient) -> None:
    """Clear the gradient of head rows that are not trainable.

    The products over the lists do not look at which rows train.
    """
    if p.trainable is None or head_gradient.columns is not None:
        return
    frozen = torch.ones(p.head.shape[0], dtype=torch.bool, device=p.head.device)
    frozen[p.trainable.rows(frozen.device)] = False
    head_gradient.values.masked_fill_(frozen[:, None], 0.0)
