"""Exponentials become gradients in place, and meet the head and the hidden rows (METHOD.md §§3–5)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels import fused, sliced
from ilrec_kernels.columns import Columns, select
from ilrec_kernels.linear import hidden_gradient, weight_gradient
from ilrec_kernels.merge import Merged
from ilrec_kernels.normalisers import distill_students
from ilrec_kernels.problem import Plan, Problem
from ilrec_kernels.state import Chunk, Gradients


def add_gradients(p: Problem, plan: Plan, chunk: Chunk, merged: Merged, weights: list[Tensor], out: Gradients) -> None:
    """Exponentials become gradients in place, then the two products (METHOD.md §§3–5)."""
    assert chunk.stats is not None
    o, stats = p.options, chunk.stats
    scale = out.scale[chunk.begin : chunk.end].to(chunk.x.dtype)
    grad_x = torch.zeros_like(chunk.x)
    # cross-entropy on adjusted logits, and the soft label's share of plain p
    factor = scale * (torch.exp(stats.top - merged.adjusted) + o.crr_lambda * merged.some * torch.exp(stats.top - merged.plain))
    factor = factor.masked_fill(stats.top == -torch.inf, 0.0)
    at_target = -scale * (1 + o.crr_lambda * merged.some * merged.target_label)
    at_sent = merged.sent_gradient(scale, o)
    if plan.softmax and not plan.fused:
        g = chunk.z_final
        assert g is not None
        g.mul_(factor[:, None])
        g.view(-1).index_copy_(0, chunk.sent.slot, at_sent)
        mine = chunk.owned.nonzero().flatten()
        g.view(-1).index_add_(0, mine * g.shape[1] + chunk.y[mine], at_target[mine])
    elif not plan.softmax:
        assert chunk.local is not None and chunk.p_final is not None
        slot = chunk.sent.slot
        g = chunk.p_final.mul_(factor.take(chunk.local.row))
        g.index_copy_(0, slot[slot >= 0], at_sent[slot >= 0])
        mine = chunk.local.is_target
        g[mine] += at_target[chunk.local.row[mine]]
    # distillation: μ/m·(p^l − p^L), the difference formed in fp32
    students = own = other = None
    if plan.streams > 1 and o.mu > 0:
        share = scale * (o.mu / (plan.streams - 1))
        own = (-share * torch.exp(stats.teacher_top - merged.teacher)).masked_fill_(stats.teacher_top == -torch.inf, 0.0)
        other = (share * torch.exp(stats.layer_top - merged.layer)).masked_fill_(stats.layer_top == -torch.inf, 0.0)
        if plan.distill is not None and plan.fused:
            pass  # below, with the final layer
        elif plan.distill is not None:
            assert chunk.teacher is not None
            teacher, students = chunk.teacher.mul_(own[:, None]), distill_students(plan, chunk)
            for i in range(students.shape[0]):
                torch.addcmul(teacher, students[i], other[i][:, None], out=students[i])
        else:
            assert chunk.teacher is not None and chunk.local is not None and chunk.p_layers is not None
            teacher, students = chunk.teacher.mul_(own.take(chunk.local.row)), chunk.p_layers
            for i in range(students.shape[0]):
                torch.addcmul(teacher, students[i], other[i].take(chunk.local.row), out=students[i])
    factors = (factor, at_target, at_sent, own, other)
    if plan.sliced:
        sliced.finish(p, plan, chunk, factors, grad_x, out)
    elif plan.fused:
        chunk.z_final, layers = fused.finish(p, plan, chunk, factors)
        if layers is not None and plan.distill is not None and plan.layers is not None:
            chunk.z_layers = layers
            students = select(layers, plan.distill.within(plan.layers))
    back_project(p, plan, chunk, students, weights, grad_x, out)


def back_project(p: Problem, plan: Plan, chunk: Chunk, students: Tensor | None, weights: list[Tensor], grad_x: Tensor, out: Gradients) -> None:
    """The products of the gradients with the head and with the hidden rows."""
    jobs: list[tuple[Tensor, Tensor, Tensor, Tensor, Columns]] = []  # gradient, hidden, hidden's gradient, head rows, columns
    stacked = plan.softmax and not plan.sliced and plan.distill is not None and plan.layers is not None and plan.layers.same(plan.final)
    if stacked and students is not None:
        assert chunk.z_final is not None and chunk.z_layers is not None and plan.distill is not None and plan.layers is not None
        inside = plan.distill.within(plan.layers)
        if isinstance(inside, slice) and len(plan.distill) * 8 >= len(plan.layers) * 7:
            chunk.z_layers[..., : inside.start] = 0
            chunk.z_layers[..., inside.stop :] = 0
            shape, strides = (plan.streams * chunk.n, len(plan.layers)), chunk.z_final.stride()
            both = chunk.z_final.as_strided(shape, strides)  # the streams' matrices are one above the other
            jobs.append((both, chunk.x.flatten(0, 1), grad_x.flatten(0, 1), weights[0], plan.layers))
            students = None
            stacked = True
        else:
            stacked = False
    else:
        stacked = False
    if plan.softmax and not stacked and not plan.sliced:
        assert chunk.z_final is not None and plan.final is not None
        jobs.append((chunk.z_final, chunk.x[0], grad_x[0], weights[0], plan.final))
    if plan.distill is not None and students is not None:
        jobs.append((students.flatten(0, 1), chunk.x[1:].flatten(0, 1), grad_x[1:].flatten(0, 1), weights[2], plan.distill))
    for grad, _, dx, weight, _ in jobs:
        hidden_gradient(grad, weight, dx, plan.block)
    if chunk.ragged is not None:
        first = 1 if plan.softmax else 0
        last = plan.streams if plan.ragged_distill else 1
        if last > first:
            assert chunk.p_final is not None
            grad = torch.cat(([chunk.p_final[None]] if first == 0 else []) + ([students] if plan.ragged_distill and students is not None else []))
            chunk.ragged.backward(grad, chunk.x[first:last], p.head, grad_x[first:last], out.head)
    reduction = dist.all_reduce(grad_x, group=p.group, async_op=True) if p.group is not None else None
    if out.head is not None:
        for grad, x, _, _, columns in jobs:
            add_head_gradient(p, grad, x, columns, out.head)
    if reduction is not None:
        reduction.wait()
    for stream, target in enumerate(out.hidden[: plan.streams]):
        if target is not None:
            target[chunk.begin : chunk.end] = grad_x[stream]


def add_head_gradient(p: Problem, grad: Tensor, x: Tensor, columns: Columns, out: Tensor) -> None:
    """out[columns] += gradᵀ · x, for the trainable rows alone where only some train."""
    low, wanted = p.head.dtype, p.trainable
    if wanted is None and columns.index is None:
        return weight_gradient(grad, x, out[columns.start : columns.stop], low)
    if wanted is None:
        rows, part = columns.index, grad
    else:
        ids = wanted.rows(grad.device)
        position, inside = columns.find(ids)
        rows, part = ids[inside], grad.index_select(1, position[inside])
    assert rows is not None
    update = out.new_zeros(rows.numel(), out.shape[1])
    weight_gradient(part, x, update, low)
    out.index_add_(0, rows, update)  # distinct rows: the order does not matter
