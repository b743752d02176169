"""A rank's softmax statistics of a chunk (METHOD.md §7); logits become exponentials in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ilrec_kernels import fused, sliced
from ilrec_kernels.columns import select
from ilrec_kernels.exchange import RankStats
from ilrec_kernels.negatives import find_candidates, send_listed
from ilrec_kernels.problem import Plan, Problem
from ilrec_kernels.segments import exp_below, finite, segment_max, segment_sum
from ilrec_kernels.state import Chunk


def collect_statistics(p: Problem, plan: Plan, chunk: Chunk, early: Tensor | None) -> None:
    """This rank's part of METHOD.md §7: candidates first, since normalisers leave them out; logits become exponentials in place."""
    stats = RankStats.zeros(chunk.n, plan.streams - 1, p.dtype, chunk.x.device)
    chunk.stats = stats
    if p.options.needs_negatives:
        find_candidates(p, plan, chunk, early)
    listed = (
        sliced.collect(p, plan, chunk)
        if plan.sliced
        else fused.collect(plan, chunk)
        if plan.fused
        else None
    )
    if listed is not None:
        send_listed(p, plan, chunk, listed)
    if plan.shared:
        shared_statistics(plan, chunk, stats)
    elif not plan.fused or plan.distill is None:
        distill_statistics(plan, chunk, stats)
    if plan.softmax and (plan.fused or plan.shared):
        return
    if plan.softmax:
        z = chunk.z_final
        assert z is not None
        stats.z_target = target_logits(chunk, z)
        z.view(-1).index_fill_(0, chunk.sent.slot, -torch.inf)
        for rows in plan.tiles(*z.shape):
            stats.top[rows], stats.rest[rows] = exponentiate(z[rows])
    else:
        z, local = chunk.p_final, chunk.local
        assert z is not None and local is not None
        stats.z_target[local.target_row] = z.take(local.target)
        chunk.p_final = z = z.index_fill(0, chunk.sent.slot[chunk.sent.slot >= 0], -torch.inf)
        stats.top = segment_max(z, local.row, chunk.n)
        z.sub_(finite(stats.top).take(local.row)).exp_()
        stats.rest = segment_sum(z, local.row, chunk.n)


def target_logits(chunk: Chunk, z: Tensor) -> Tensor:
    """[n] z(y) of the final layer's logits on its owner, else 0."""
    return (
        z[chunk.row, chunk.y].masked_fill_(~chunk.owned, 0.0)
        if z.shape[1]
        else z.new_zeros(chunk.n)
    )


def shared_statistics(plan: Plan, chunk: Chunk, stats: RankStats) -> None:
    """Where cross-entropy and distillation cover the same columns: the final layer's exponentials serve both, 0 at the sent entries once the
    teacher has been read. Its maximum is over all of them: what e^(z − max) then loses is below 10⁻³⁸ of a sent entry."""
    z, students = chunk.z_final, chunk.z_layers
    assert z is not None and students is not None
    stats.z_target = target_logits(chunk, z)
    columns = z.shape[1]
    chunk.teacher_sent = torch.empty_like(chunk.sent.z)
    for rows, entries, place in chunk.sent_in(list(plan.tiles(*z.shape)), columns):
        part, teacher = z[rows], chunk.desk(rows, columns)
        top = row_max(part)
        stats.top[rows] = stats.teacher_top[rows] = top
        stats.teacher_rest[rows] = exp_below(part, top, out=teacher).sum(1)
        for i, student in enumerate(students[:, rows].unbind(0)):
            stats.cross[i, rows] = (
                torch.sub(part, student).mul_(teacher).sum(1)
            )  # not the difference of two large sums
            stats.layer_top[i, rows], stats.layer_rest[i, rows] = exponentiate(student)
        flat = teacher.view(-1)
        chunk.teacher_sent[entries] = flat.take(place)
        flat.index_fill_(0, place, 0.0)
        stats.rest[rows] = teacher.sum(1)
        part.copy_(teacher)


def exponentiate(z: Tensor) -> tuple[Tensor, Tensor]:
    """z [n, c] becomes e^(z − max) in place; returns (max [n], sum [n])."""
    top = row_max(z)
    return top, exp_below(z, top).sum(1)


def row_max(z: Tensor) -> Tensor:
    return z.amax(1) if z.shape[1] else z.new_full((z.shape[0],), -torch.inf)


def distill_statistics(plan: Plan, chunk: Chunk, stats: RankStats) -> None:
    """Per layer the maximum, the sum of exponentials and Σ e^(z^L − max)·(z^L − z^l) over the distill scope."""
    if plan.distill is not None:
        assert (
            chunk.z_final is not None
            and chunk.z_layers is not None
            and plan.final is not None
            and plan.layers is not None
        )
        students, within = distill_students(plan, chunk), plan.distill.within(plan.final)
        chunk.teacher = chunk.scratch.teacher[: chunk.n * len(plan.distill)].view(chunk.n, -1)
        for rows in plan.tiles(*chunk.teacher.shape):
            z, teacher = select(chunk.z_final[rows], within), chunk.teacher[rows]
            stats.teacher_top[rows] = top = row_max(z)
            stats.teacher_rest[rows] = exp_below(z, top, out=teacher).sum(1)
            for i, student in enumerate(students[:, rows].unbind(0)):
                stats.cross[i, rows] = (
                    torch.sub(z, student).mul_(teacher).sum(1)
                )  # not the difference of two large sums
                stats.layer_top[i, rows], stats.layer_rest[i, rows] = exponentiate(student)
    elif plan.ragged_distill:
        assert chunk.local is not None and chunk.p_final is not None and chunk.p_layers is not None
        local, n = chunk.local, chunk.n
        listed = local.source >= 0
        z = chunk.p_final.masked_fill(~listed, -torch.inf)
        stats.teacher_top = segment_max(z, local.row, n)
        chunk.teacher = z.sub_(finite(stats.teacher_top).take(local.row)).exp_()
        stats.teacher_rest = segment_sum(chunk.teacher, local.row, n)
        for i, student in enumerate(chunk.p_layers):
            stats.cross[i] = segment_sum(chunk.teacher * (chunk.p_final - student), local.row, n)
            student.masked_fill_(~listed, -torch.inf)
            stats.layer_top[i] = segment_max(student, local.row, n)
            student.sub_(finite(stats.layer_top[i]).take(local.row)).exp_()
            stats.layer_rest[i] = segment_sum(student, local.row, n)


def distill_students(plan: Plan, chunk: Chunk) -> Tensor:
    """[m, n, c] of the layers' logits over the distill columns: a view, or, where the columns are scattered, moved together (once) in their memory."""
    assert chunk.z_layers is not None and plan.distill is not None and plan.layers is not None
    within = plan.distill.within(plan.layers)
    if isinstance(within, slice):
        return chunk.z_layers[..., within]
    if chunk.z_layers.shape[-1] != len(plan.distill):
        z = chunk.z_layers.flatten(0, 1)
        compact = chunk.z_layers.view(-1)[: len(z) * len(plan.distill)].view(len(z), -1)
        for rows in plan.tiles(*z.shape):  # a row moves to where only rows up to itself were
            compact[rows] = z[rows].index_select(1, within)
        chunk.z_layers = compact.unflatten(0, chunk.z_layers.shape[:2])
    return chunk.z_layers
