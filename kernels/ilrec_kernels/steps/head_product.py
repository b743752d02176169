"""The products of dense gradients with the head and with the hidden rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ilrec_kernels.chunk import Chunk
from ilrec_kernels.layout.gemm import hidden_gradient, weight_gradient
from ilrec_kernels.layout.head_gradient import HeadGradient
from ilrec_kernels.layout.vocab_columns import VocabColumns
from ilrec_kernels.plan import Plan
from ilrec_kernels.problem import Problem
from ilrec_kernels.steps.logits import DenseLogits


@dataclass(frozen=True)
class HeadProduct:
    """A product gradᵀ · x that is still to be added to the head's gradient."""

    grad: Tensor  # [r, c]
    x: Tensor  # [r, d]
    columns: VocabColumns


def multiply_with_head(
    p: Problem, plan: Plan, chunk: Chunk, z: DenseLogits, students: Tensor, out: Tensor
) -> list[HeadProduct]:
    """Write dense gradients times the head to out [S, n, d]; return what the head is
    due.

    z.final holds the final layer's gradients where the softmax is dense; `students`
    [m, n, c] are the layers' gradients over the distill columns, m = 0 without dense
    distillation.
    """
    stacked = _stacked(plan, chunk, z, students)
    if stacked is not None:
        hidden_gradient(stacked, p.head, plan.final.columns, out.flatten(0, 1), plan.block)
        return [HeadProduct(stacked, chunk.x.flatten(0, 1), plan.final.columns)]
    products = []
    if plan.softmax.is_dense:
        hidden_gradient(z.final, p.head, plan.final.columns, out[0], plan.block)
        products.append(HeadProduct(z.final, chunk.x[0], plan.final.columns))
    if len(students):
        grad, columns = students.flatten(0, 1), plan.distill.columns
        hidden_gradient(grad, p.head, columns, out[1:].flatten(0, 1), plan.block)
        products.append(HeadProduct(grad, chunk.x[1:].flatten(0, 1), columns))
    return products


def _stacked(plan: Plan, chunk: Chunk, z: DenseLogits, students: Tensor) -> Tensor | None:
    """Return all streams' gradients as one matrix [S·n, c], where they lie so in
    memory.

    The layers' columns outside the distill scope
    become 0; that pays where they are few.
    """
    if not (plan.softmax.is_dense and len(students) and plan.one_product):
        return None
    distilled = plan.distill.columns.within(plan.layers.columns)
    few_outside = len(plan.distill) * 8 >= len(plan.layers) * 7
    if not isinstance(distilled, slice) or not few_outside:
        return None
    z.layers[..., : distilled.start] = 0
    z.layers[..., distilled.stop :] = 0
    return z.final.as_strided((plan.streams * chunk.n, len(plan.layers)), z.final.stride())


def add_head_gradient(p: Problem, plan: Plan, product: HeadProduct, out: HeadGradient) -> None:
    """Compute out[columns] += gradᵀ · x, for the trainable rows alone."""
    trainable, columns = p.trainable, product.columns
    if not columns.is_scattered and (trainable is None or not trainable.is_scattered):
        first, last = columns.start, columns.stop
        if trainable is not None:
            first, last = max(first, trainable.start), min(last, trainable.stop)
        if first < last:
            grad = product.grad[:, first - columns.start : last - columns.start]
            weight_gradient(grad, product.x, p.head, out.range(first, last), plan.block)
        return
    values = out.values
    rows, index = columns.rows(values.device), None
    if trainable is not None:
        rows = trainable.rows(values.device)
        position, mask = columns.find(rows)
        here = mask.nonzero().flatten()
        rows, index = rows.take(here), position.take(here)
    rows = out.places(rows)
    step = max(1, plan.budget // (values.element_size() * sum(product.x.shape)))
    for i in range(0, rows.numel(), step):
        # The rows are distinct, so they may be copied out and back.
        part = rows[i : i + step]
        if index is None:
            grad = product.grad[:, i : i + step]
        else:
            grad = product.grad.index_select(1, index[i : i + step])
        update = values.index_select(0, part)
        weight_gradient(grad, product.x, p.head, update, plan.block)
        values.index_copy_(0, part, update)
