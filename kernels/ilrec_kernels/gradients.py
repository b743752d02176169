"""Exponentials become gradients in place, and meet the head and the hidden rows (METHOD.md §§3–5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels import fused, sliced
from ilrec_kernels.columns import Columns, select
from ilrec_kernels.linear import hidden_gradient, weight_gradient
from ilrec_kernels.merge import Merged
from ilrec_kernels.normalisers import distill_students
from ilrec_kernels.problem import Plan, Problem
from ilrec_kernels.state import Chunk, Factors, Gradients


def add_gradients(p: Problem, plan: Plan, chunk: Chunk, merged: Merged, out: Gradients) -> None:
    """The chunk's gradients, added to `out`."""
    factors = row_factors(p, plan, chunk, merged, out.scale[chunk.begin : chunk.end].to(p.dtype))
    grad_x = torch.zeros_like(chunk.x, dtype=p.dtype)
    students: Tensor | None = None
    if plan.sliced:
        sliced.finish(p, plan, chunk, factors, grad_x, out)
    elif plan.fused:
        chunk.z_final, layers = fused.finish(p, plan, chunk, factors)
        if layers is not None and plan.distill is not None and plan.layers is not None:
            chunk.z_layers = layers
            students = select(layers, plan.distill.within(plan.layers))
    elif plan.softmax:
        if plan.shared and factors.layer is not None:
            students = shared_student_gradients(plan, chunk, factors)
        final_gradient(plan, chunk, factors)
    if not plan.softmax:
        listed_gradient(chunk, factors)
    if students is None and factors.layer is not None and not plan.sliced:
        students = student_gradients(plan, chunk, factors)
    back_project(p, plan, chunk, students, grad_x, out)


def row_factors(p: Problem, plan: Plan, chunk: Chunk, merged: Merged, scale: Tensor) -> Factors:
    """From the merged normalisers."""
    o, stats = p.options, chunk.stats
    assert stats is not None
    soft = o.crr_lambda * merged.some
    # cross-entropy on adjusted logits, and the soft label's share of plain p
    final = scale * (
        torch.exp(stats.top - merged.adjusted) + soft * torch.exp(stats.top - merged.plain)
    )
    teacher = layer = None
    if plan.streams > 1 and o.mu > 0:  # μ/m·(p^l − p^L)
        share = scale * (o.mu / (plan.streams - 1))
        teacher = (-share * torch.exp(stats.teacher_top - merged.teacher)).masked_fill_(
            stats.teacher_top == -torch.inf, 0.0
        )
        layer = (share * torch.exp(stats.layer_top - merged.layer)).masked_fill_(
            stats.layer_top == -torch.inf, 0.0
        )
    return Factors(
        final=final.masked_fill_(stats.top == -torch.inf, 0.0),
        target=-scale * (1 + soft * merged.target_label),
        sent=merged.sent_gradient(scale, o),
        teacher=teacher,
        layer=layer,
    )


def final_gradient(plan: Plan, chunk: Chunk, factors: Factors) -> None:
    """The final layer's dense logits."""
    g = chunk.z_final
    assert g is not None
    g.mul_(factors.final[:, None])
    g.view(-1).index_copy_(0, chunk.sent.slot, factors.sent)
    mine = chunk.owned.nonzero().flatten()
    g.view(-1).index_add_(0, mine * g.shape[1] + chunk.y[mine], factors.target[mine])


def listed_gradient(chunk: Chunk, factors: Factors) -> None:
    """The final layer's logits at the lists (masked softmax)."""
    assert chunk.local is not None and chunk.p_final is not None
    g, inside = (
        chunk.p_final.mul_(factors.final.take(chunk.local.row)),
        (chunk.sent.slot >= 0).nonzero().flatten(),
    )
    g.index_copy_(0, chunk.sent.slot.take(inside), factors.sent.take(inside))
    g.index_add_(
        0, chunk.local.target, factors.target.take(chunk.local.target_row)
    )  # distinct pairs


def student_gradients(plan: Plan, chunk: Chunk, factors: Factors) -> Tensor:
    """Distillation at the layers' logits, [m, n, c] or [m, P], the difference formed in fp32."""
    own, other, teacher = factors.teacher, factors.layer, chunk.teacher
    assert own is not None and other is not None and teacher is not None
    if plan.distill is None:
        assert chunk.local is not None and chunk.p_layers is not None
        row, students = chunk.local.row, chunk.p_layers
        teacher = teacher.mul_(own.take(row))
        for student, factor in zip(students, other, strict=True):
            torch.addcmul(teacher, student, factor.take(row), out=student)
        return students
    students = distill_students(plan, chunk)
    for rows in plan.tiles(*teacher.shape):
        part = teacher[rows].mul_(own[rows, None])
        for student, factor in zip(students[:, rows], other[:, rows, None], strict=True):
            torch.addcmul(part, student, factor, out=student)
    return students


def shared_student_gradients(plan: Plan, chunk: Chunk, factors: Factors) -> Tensor:
    """As student_gradients, [m, n, c], where the final layer's exponentials are the teacher's but for the sent entries."""
    z, students, own, other, at_sent = (
        chunk.z_final,
        chunk.z_layers,
        factors.teacher,
        factors.layer,
        chunk.teacher_sent,
    )
    assert (
        z is not None
        and students is not None
        and own is not None
        and other is not None
        and at_sent is not None
    )
    columns = z.shape[1]
    for rows, entries, place in chunk.sent_in(list(plan.tiles(*z.shape)), columns):
        teacher = torch.mul(z[rows], own[rows, None], out=chunk.desk(rows, columns))
        teacher.view(-1).index_copy_(0, place, at_sent[entries] * own.take(chunk.sent.row[entries]))
        for student, factor in zip(students[:, rows], other[:, rows, None], strict=True):
            torch.addcmul(teacher, student, factor, out=student)
    return students


@dataclass(frozen=True)
class Product:
    """Gradients at logits [r, c] with what they are multiplied by."""

    grad: Tensor
    x: Tensor  # [r, d] hidden rows
    grad_x: Tensor  # [r, d] where their gradient goes
    columns: Columns  # whose rows of the head they meet


def products(plan: Plan, chunk: Chunk, students: Tensor | None, grad_x: Tensor) -> list[Product]:
    """All streams at once where their gradients lie one above the other; else the final layer's, then the layers'."""
    out: list[Product] = []
    if plan.sliced:
        return out
    dense = plan.distill is not None and students is not None
    if plan.softmax and dense and plan.layers is not None and plan.layers.same(plan.final):
        assert chunk.z_final is not None and chunk.z_layers is not None and plan.distill is not None
        inside = plan.distill.within(plan.layers)
        if isinstance(inside, slice) and len(plan.distill) * 8 >= len(plan.layers) * 7:
            chunk.z_layers[..., : inside.start] = 0
            chunk.z_layers[..., inside.stop :] = 0
            both = chunk.z_final.as_strided(
                (plan.streams * chunk.n, len(plan.layers)), chunk.z_final.stride()
            )
            return [Product(both, chunk.x.flatten(0, 1), grad_x.flatten(0, 1), plan.layers)]
    if plan.softmax:
        assert chunk.z_final is not None and plan.final is not None
        out.append(Product(chunk.z_final, chunk.x[0], grad_x[0], plan.final))
    if dense:
        assert students is not None and plan.distill is not None
        out.append(
            Product(
                students.flatten(0, 1),
                chunk.x[1:].flatten(0, 1),
                grad_x[1:].flatten(0, 1),
                plan.distill,
            )
        )
    return out


def back_project(
    p: Problem, plan: Plan, chunk: Chunk, students: Tensor | None, grad_x: Tensor, out: Gradients
) -> None:
    """The products of the gradients with the head, summed over ranks while those with the hidden rows run."""
    jobs = products(plan, chunk, students, grad_x)
    for job in jobs:
        hidden_gradient(job.grad, p.head, job.columns, job.grad_x, plan.block)
    if chunk.ragged is not None:
        first, last = 1 if plan.softmax else 0, plan.streams if plan.ragged_distill else 1
        if last > first:
            parts = [chunk.p_final] if first == 0 and chunk.p_final is not None else []
            parts += students.unbind(0) if plan.ragged_distill and students is not None else ()
            chunk.ragged.backward(parts, chunk.x[first:last], p.head, grad_x[first:last], out.head)
    reduction = (
        dist.all_reduce(grad_x, group=p.group, async_op=True) if p.group is not None else None
    )
    if out.head is not None:
        for job in jobs:
            add_head_gradient(p, plan, job, out.head)
    if reduction is not None:
        reduction.wait()
    for stream, target in enumerate(out.hidden[: plan.streams]):
        if target is not None:
            target[chunk.begin : chunk.end] = grad_x[stream]


def add_head_gradient(p: Problem, plan: Plan, job: Product, out: Tensor) -> None:
    """out[columns] += gradᵀ · x, for the trainable rows alone where only some train."""
    low, wanted, columns = p.head.dtype, p.trainable, job.columns
    if columns.index is None and (wanted is None or wanted.index is None):
        first, last = (
            (columns.start, columns.stop)
            if wanted is None
            else (max(columns.start, wanted.start), min(columns.stop, wanted.stop))
        )
        if first < last:
            weight_gradient(
                job.grad[:, first - columns.start : last - columns.start],
                job.x,
                out[first:last],
                low,
            )
        return
    place = None
    if wanted is None:
        rows = columns.rows(out.device)
    else:
        ids = wanted.rows(out.device)
        position, inside = columns.find(ids)
        here = inside.nonzero().flatten()
        rows, place = ids.take(here), position.take(here)
    step = max(1, plan.budget // (out.element_size() * sum(job.x.shape)))
    for i in range(0, rows.numel(), step):
        some = rows[i : i + step]
        grad = (
            job.grad[:, i : i + step]
            if place is None
            else job.grad.index_select(1, place[i : i + step])
        )
        update = out.index_select(0, some)
        weight_gradient(grad, job.x, update, low)
        out.index_copy_(0, some, update)  # distinct rows
