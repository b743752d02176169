"""The operator's one call, `cross_layer_loss`, and its node in autograd."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels import loop
from ilrec_kernels.chunk import Gradients
from ilrec_kernels.layout.head_gradient import HeadGradient
from ilrec_kernels.layout.vocab_columns import VocabColumns
from ilrec_kernels.options import (
    Backend,
    LossOptions,
    LossOutput,
    RowStats,
    TokenLists,
    compute_dtype,
)
from ilrec_kernels.problem import Problem
from ilrec_kernels.reference import gather_head, reference_rows

Reduction = Literal["mean", "sum", "none"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _outside_compiled_graphs(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let torch.compile break its graph at the
    call; torch's own decorator is untyped.
    """
    disabled = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
    return cast(Callable[Arguments, Result], disabled)


@_outside_compiled_graphs
def cross_layer_loss(
    final_hidden: Tensor,
    layer_hidden: Sequence[Tensor],
    head_weight: Tensor,
    targets: Tensor,
    candidates: TokenLists | None,
    rewards: Tensor | None,
    options: LossOptions,
    *,
    vocab: tuple[int, int] | None = None,
    loss_scale: float = 1.0,
    trainable_rows: tuple[int, int] | Tensor | None = None,
    trained_rows: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    reduction: Reduction = "sum",
) -> LossOutput:
    """Compute ILRec's loss (METHOD.md §§2–7) of N rows, differentiable.

    final_hidden    [N, d] n^L, after the final norm; fp32, bf16, fp16 or fp64
    layer_hidden    m tensors [N, d], n^{L−1} … n^{L−m}
    head_weight     [≥ stop − start, d] this rank's rows of the head; with tied
                    embeddings simply the embedding's weight
    targets         int64 [N] global token ids
    candidates      the valid_next lists; needed by a valid_next scope and by λ > 0
    rewards         [nnz], aligned with candidates.tokens; needed by λ > 0
    vocab           the global tokens [start, stop) that head_weight's rows stand for;
                    uneven and empty shards are fine. None: all of them
    loss_scale      multiplies the sum over rows (for a mean over the whole optimizer
                    step: 1 / its number of rows)
    trainable_rows  global tokens whose head rows get a gradient, a range or an
                    ascending int64 tensor; the other rows' is 0. None: all
    trained_rows    [R, d] the rows of head_weight in the range trainable_rows, as a
                    tensor of its own that gets their gradient in place of head_weight,
                    so that none of the head's size is made. R may exceed this rank's
                    number of such rows; the further ones are not read
    tp_group        the ranks that hold the shards, in token order; hidden rows,
                    targets, candidates and rewards are the same on each
    reduction       "sum": loss_scale · Σ; "mean": the same divided by N; "none":
                    loss_scale · each row's loss [N]

    Hidden gradients are summed over tp_group, so they are the whole gradient and
    identical on each rank; the head's gradient is the shard's. Logits, normalisers and
    the head's gradient are fp32 (fp64 for fp64 inputs), also under autocast. On a GPU
    the factors of the products have the head's dtype, so hidden rows in fp32 are
    rounded to bf16 for a bf16 head; a CPU with bf16 products does the same in the
    gradients' two products. For "sum" and "mean" gradients are made in forward and
    multiplied by the upstream gradient in backward; for "none" they are made in
    backward. Under no_grad only the loss is computed.

    Raises ValueError, naming the argument, for shapes, dtypes and scopes that do not go
    together. Targets outside [0, vocab_size) raise too; on a GPU as a device-side
    assertion, which the process does not survive.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")
    _check_inputs(final_hidden, layer_hidden, head_weight, targets, options, vocab)
    _check_lists(targets.numel(), candidates, rewards, options)
    _check_backend(final_hidden, head_weight, options)
    _check_trained_rows(trained_rows, trainable_rows, head_weight, vocab)
    problem = _make_problem(
        (final_hidden, *layer_hidden),
        head_weight,
        targets,
        candidates,
        rewards,
        options,
        vocab,
        trainable_rows,
        tp_group,
    )
    n = targets.numel()
    scale = loss_scale / max(n, 1) if reduction == "mean" else loss_scale
    if options.backend is Backend.REFERENCE:
        head = _with_trained_rows(head_weight, trained_rows, problem)
        head = gather_head(head, vocab or (0, head_weight.shape[0]), options, problem.group)
        head = _detach_frozen_rows(head, problem)
        row_loss, rows = reference_rows(
            [final_hidden, *layer_hidden], head, targets, candidates, rewards, options
        )
        row_loss = (row_loss * scale).to(problem.dtype)
        loss = row_loss if reduction == "none" else row_loss.sum()
    else:
        separate = trained_rows is not None
        call = _Call(problem, float(scale), reduction == "none", torch.is_grad_enabled(), separate)
        statistics: list[RowStats] = []
        loss = _CrossLayerLoss.apply(  # type: ignore[no-untyped-call]
            call,
            statistics,
            final_hidden,
            *layer_hidden,
            head_weight if trained_rows is None else trained_rows,
        )
        rows = statistics[0]

    def reduced(values: Tensor) -> Tensor:
        scaled = values * scale
        return scaled if reduction == "none" else scaled.sum()

    return LossOutput(loss, reduced(rows.cpo), reduced(rows.cpd), reduced(rows.crr), rows)


@dataclass(frozen=True)
class _Call:
    """What the autograd node carries besides the tensors that may need a gradient.

    separate_rows: the last of these tensors are the trained rows alone, not the head.
    """

    problem: Problem
    scale: float
    per_row: bool
    grad_enabled: bool
    separate_rows: bool

    def compute(
        self, hidden: Sequence[Tensor], head: Tensor, row_scale: Tensor, wanted: Sequence[bool]
    ) -> tuple[RowStats, list[Tensor | None]]:
        """Return statistics and the wanted gradients,
        hidden streams first, the head last.

        `hidden` and `head`, or its trained rows, are what autograd hands over.
        """
        p = replace(self.problem, hidden=tuple(hidden))
        columns = p.trainable
        if not self.separate_rows:
            p, columns = replace(p, head=head), None
        # Every product says itself what its factors are rounded to.
        with torch.autocast(head.device.type, enabled=False):
            if not any(wanted):
                return loop.run(p, None), [None] * len(wanted)
            head_gradient = None
            if wanted[-1]:
                values = torch.zeros(head.shape, dtype=p.dtype, device=head.device)
                head_gradient = HeadGradient(values, columns)
            gradients = Gradients(
                [torch.zeros_like(h) if w else None for h, w in zip(hidden, wanted, strict=False)],
                head_gradient,
                row_scale,
            )
            rows = loop.run(p, gradients)
            of_head = None if head_gradient is None else head_gradient.values
            return rows, [*gradients.hidden, of_head]


class _CrossLayerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, statistics: list[RowStats], *tensors: Tensor) -> Tensor:
        hidden, head = tensors[:-1], tensors[-1]
        o, dtype = call.problem.options, call.problem.dtype
        wanted = [call.grad_enabled and need for need in ctx.needs_input_grad[2:]]
        ctx.call, ctx.wanted = call, wanted
        row_scale = torch.full((call.problem.n,), call.scale, dtype=dtype, device=head.device)
        if call.per_row:
            rows, _ = call.compute(hidden, head, row_scale, [False] * len(wanted))
            ctx.save_for_backward(*tensors)
        else:
            rows, gradients = call.compute(hidden, head, row_scale, wanted)
            ctx.save_for_backward(*(g for g in gradients if g is not None))
        statistics.append(rows)
        losses = (rows.cpo.to(dtype) + o.mu * rows.cpd + o.crr_lambda * rows.crr) * call.scale
        return losses if call.per_row else losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        if call.per_row:
            *hidden, head = ctx.saved_tensors
            _, gradients = call.compute(hidden, head, upstream * call.scale, ctx.wanted)
            return None, None, *gradients
        saved = list(ctx.saved_tensors)
        # An upstream gradient of 1 needs no second copy of the head's gradient.
        if float(upstream) != 1.0:
            saved = [g * upstream.to(g.dtype) for g in saved]
        gradients = [saved.pop(0) if wanted else None for wanted in ctx.wanted]
        return None, None, *gradients


def _check_inputs(
    final_hidden: Tensor,
    layer_hidden: Sequence[Tensor],
    head: Tensor,
    targets: Tensor,
    options: LossOptions,
    vocab: tuple[int, int] | None,
) -> None:
    n, d = final_hidden.shape
    start, stop = vocab if vocab is not None else (0, head.shape[0])
    for i, hidden in enumerate(layer_hidden):
        if hidden.shape != final_hidden.shape:
            raise ValueError(
                f"layer_hidden[{i}]: expected shape {tuple(final_hidden.shape)} as final_hidden,"
                f" got {tuple(hidden.shape)}"
            )
    from_layers = options.needs_negatives and options.negatives_from != "final"
    if not layer_hidden and (options.mu > 0 or from_layers):
        raise ValueError("layer_hidden: expected at least one intermediate layer")
    if head.dim() != 2 or head.shape[1] != d or head.shape[0] < stop - start or stop < start:
        raise ValueError(
            f"head_weight: expected at least {stop - start} rows of {d}, got {tuple(head.shape)}"
        )
    if targets.shape != (n,) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: expected int64 [{n}], got {targets.dtype} {list(targets.shape)}"
        )
    if n and targets.is_cuda:
        # The device asserts it later: to ask it here would wait for all of the model's forward.
        torch._assert_async(((targets >= 0) & (targets < options.vocab_size)).all())
    elif n and not 0 <= int(targets.min()) <= int(targets.max()) < options.vocab_size:
        raise ValueError(
            f"targets: expected ids in [0, {options.vocab_size}),"
            f" got {int(targets.min())} to {int(targets.max())}"
        )


def _check_lists(
    n: int, candidates: TokenLists | None, rewards: Tensor | None, options: LossOptions
) -> None:
    if options.needs_candidates and candidates is None:
        raise ValueError("candidates: needed by a valid_next scope and by crr_lambda > 0")
    if candidates is not None and candidates.indptr.shape != (n + 1,):
        raise ValueError(
            f"candidates.indptr: expected [{n + 1}], got {list(candidates.indptr.shape)}"
        )
    if options.crr_lambda > 0 and (
        rewards is None or candidates is None or rewards.shape != candidates.tokens.shape
    ):
        raise ValueError("rewards: expected one for each of candidates.tokens, as crr_lambda > 0")


def _check_backend(final_hidden: Tensor, head: Tensor, options: LossOptions) -> None:
    if options.backend is not Backend.TRITON:
        return
    if compute_dtype(final_hidden) != torch.float32:
        raise ValueError(
            "final_hidden: the triton backend computes in fp32, got float64; use torch or reference"
        )
    if head.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"head_weight: the triton backend takes float32 and bfloat16, got {head.dtype};"
            " use torch"
        )
    if not head.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend: triton needs a CUDA device (or TRITON_INTERPRET=1, to test); use torch"
        )


def _check_trained_rows(
    trained_rows: Tensor | None,
    trainable_rows: tuple[int, int] | Tensor | None,
    head: Tensor,
    vocab: tuple[int, int] | None,
) -> None:
    if trained_rows is None:
        return
    if not isinstance(trainable_rows, tuple):
        raise ValueError("trained_rows: needs trainable_rows as a range of tokens")
    start, stop = vocab if vocab is not None else (0, head.shape[0])
    low, high = (min(max(edge, start), stop) for edge in trainable_rows)
    is_matrix = trained_rows.dim() == 2 and trained_rows.shape[1] == head.shape[1]
    fits = is_matrix and trained_rows.shape[0] >= high - low
    if not fits or trained_rows.dtype != head.dtype:
        raise ValueError(
            f"trained_rows: expected at least {max(0, high - low)} rows of {head.shape[1]} in "
            f"{head.dtype}, got {tuple(trained_rows.shape)} in {trained_rows.dtype}"
        )


def _make_problem(
    hidden: tuple[Tensor, ...],
    head: Tensor,
    targets: Tensor,
    candidates: TokenLists | None,
    rewards: Tensor | None,
    options: LossOptions,
    vocab: tuple[int, int] | None,
    trainable_rows: tuple[int, int] | Tensor | None,
    group: dist.ProcessGroup | None,
) -> Problem:
    """Gather checked arguments, with everything in this rank's local columns."""
    start, stop = vocab if vocab is not None else (0, head.shape[0])
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    if group is not None and options.negatives_from == "random":
        raise ValueError("negatives_from: random needs a whole vocabulary, got a tp_group")
    if group is None and stop - start < options.vocab_size:
        raise ValueError(
            f"vocab: expected all of the {options.vocab_size} tokens without a tp_group,"
            f" got [{start}, {stop})"
        )
    real = max(0, min(stop, options.vocab_size) - start)
    if isinstance(options.item_tokens, Tensor):
        options = replace(options, item_tokens=options.item_tokens.to(head.device))
    trainable = None
    if isinstance(trainable_rows, Tensor):
        rows = trainable_rows.to(head.device)
        trainable = VocabColumns(0, 0, rows[(rows >= start) & (rows < start + real)] - start)
    elif trainable_rows is not None:
        low, high = (min(max(edge - start, 0), real) for edge in trainable_rows)
        trainable = VocabColumns(low, max(low, high))
    if rewards is None:
        rewards = torch.zeros(0, device=head.device)
    return Problem(
        hidden,
        head,
        targets,
        candidates,
        rewards,
        options,
        start,
        start + real,
        group,
        trainable,
    )


def _with_trained_rows(head: Tensor, trained_rows: Tensor | None, p: Problem) -> Tensor:
    """Return this rank's head, differentiable in its trained rows."""
    if trained_rows is None or p.trainable is None:
        return head
    low, high = p.trainable.start, p.trainable.stop
    head = head.detach()
    return torch.cat([head[:low], trained_rows[: high - low], head[high:]])


def _detach_frozen_rows(head: Tensor, p: Problem) -> Tensor:
    """Return the whole head with all but the trainable rows detached."""
    if p.trainable is None:
        return head
    mask = torch.zeros(head.shape[0], 1, dtype=torch.bool, device=head.device)
    mask[p.trainable.rows(head.device) + p.start] = True
    return torch.where(mask, head, head.detach())
