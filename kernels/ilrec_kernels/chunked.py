"""The `torch` backend: chunks of rows under a fixed workspace, gradients made in forward, any device, vocabulary-parallel (METHOD.md §7)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels import fused, sliced
from ilrec_kernels.columns import Columns, select
from ilrec_kernels.linear import hidden_gradient, project, weight_gradient
from ilrec_kernels.merge import Merged, RankStats, Sent, empty_sent, exchange, merge
from ilrec_kernels.pairs import Pairs, chunk_pairs
from ilrec_kernels.problem import Plan, Problem, chunk_bounds, make_plan
from ilrec_kernels.ragged import RaggedHead
from ilrec_kernels.segments import finite, segment_max, segment_sum
from ilrec_kernels.select import dense_candidates, keep_largest
from ilrec_kernels.types import RowStats


@dataclass
class Gradients:
    """Where gradients go; None where none is wanted. The head's is fp32 (fp64 for fp64 inputs)."""

    hidden: list[Tensor | None]
    head: Tensor | None
    scale: Tensor  # [N]: what each row's loss is multiplied by


@dataclass
class Chunk:
    """The state of rows [begin, end) between the statistics and the gradients."""

    begin: int
    end: int
    x: Tensor  # [S, n, d]
    y: Tensor  # [n] local column of the target; 0 where another rank owns it
    owned: Tensor  # bool [n]
    row: Tensor  # arange(n)
    pairs: Pairs | None = None  # of the whole vocabulary
    local: Pairs | None = None  # of this rank's shard
    ragged: RaggedHead | None = None
    z_final: Tensor | None = None  # [n, c]: logits, then e^(z − max) without the sent candidates, then gradients
    z_layers: Tensor | None = None  # [m, n, c]: logits, then e^(z − max) over the distill columns, then gradients
    p_final: Tensor | None = None  # [P]: the same at the pairs
    p_layers: Tensor | None = None  # [m, P]
    teacher: Tensor | None = None  # e^(z − max) of the final layer over the distill scope: [n, c], or [P]
    sent: Sent = field(default_factory=empty_sent)
    stats: RankStats | None = None

    @property
    def n(self) -> int:
        return self.end - self.begin


def run(p: Problem, gradients: Gradients | None) -> RowStats:
    """Compute the rows' losses and statistics and, if asked, add the gradients. See api.cross_layer_loss."""
    plan = make_plan(p)
    m = len(p.hidden) - 1
    out = empty_stats(p.n, m, p.dtype, p.targets.device)
    weights = [c.weight(p.head) if c is not None else p.head[:0] for c in (plan.final, plan.layers, plan.distill)]
    early = target_ensemble(p, plan) if p.group is not None and p.options.needs_negatives else None
    for begin, end in chunk_bounds(p, plan):
        chunk = start_chunk(p, plan, weights, begin, end)
        collect_statistics(p, plan, chunk, None if early is None else early[begin:end])
        assert chunk.stats is not None
        gathered = exchange(chunk.stats, chunk.sent, p, plan)
        merged = merge(p, plan, chunk.pairs, gathered, begin, end, write=out)
        if gradients is not None:
            add_gradients(p, plan, chunk, merged, weights, gradients)
    if gradients is not None and gradients.head is not None and p.trainable is not None:
        frozen = torch.ones(p.head.shape[0], dtype=torch.bool, device=p.head.device)
        frozen[p.trainable.rows(frozen.device)] = False  # the lists' products do not look at which rows train
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


def target_ensemble(p: Problem, plan: Plan) -> Tensor:
    """[N] z̄(y) on every rank, for the pre-filter only: one small all-reduce a call."""
    sources = p.hidden[:1] if p.options.negatives_from == "final" else p.hidden[1:]
    y = p.targets - p.start
    owned = (y >= 0) & (y < p.stop - p.start)
    mine = owned.nonzero().flatten()
    out = torch.zeros(p.n, dtype=p.dtype, device=p.targets.device)
    for part in mine.split(max(1, plan.budget // (8 * p.head.shape[1]))):
        w = p.head[y[part]].to(p.dtype)
        out[part] = sum(torch.linalg.vecdot(h[part].to(p.dtype), w) for h in sources) / len(sources)  # type: ignore[assignment]
    dist.all_reduce(out, group=p.group)
    return out


def start_chunk(p: Problem, plan: Plan, weights: list[Tensor], begin: int, end: int) -> Chunk:
    """Logits: dense where the plan has columns, and at the pairs where a list scope is used."""
    n, s = end - begin, plan.streams
    x = torch.stack([h[begin:end].to(p.dtype) for h in p.hidden[:s]])
    y = p.targets[begin:end] - p.start
    owned = (y >= 0) & (y < p.stop - p.start)
    chunk = Chunk(begin, end, x, y.masked_fill_(~owned, 0), owned, torch.arange(n, device=y.device))
    if plan.sliced:
        pass  # logits are made tile by tile
    elif plan.final is not None and plan.final.same(plan.layers) and s > 1:
        z = x.new_empty(s, n, len(plan.final))
        project(x.flatten(0, 1), weights[0], z.flatten(0, 1), plan.block)
        chunk.z_final, chunk.z_layers = z[0], z[1:]
    else:
        if plan.final is not None:
            chunk.z_final = x.new_empty(n, len(plan.final))
            project(x[0], weights[0], chunk.z_final, plan.block)
        if plan.layers is not None:
            chunk.z_layers = x.new_empty(s - 1, n, len(plan.layers))
            project(x[1:].flatten(0, 1), weights[1], chunk.z_layers.flatten(0, 1), plan.block)
    if plan.pairs:
        assert p.candidates is not None
        chunk.pairs = chunk_pairs(p.candidates, p.targets[begin:end], begin, end)
        chunk.local = chunk.pairs if p.group is None else chunk.pairs.in_shard(p.start, p.stop)
        at_pairs(p, plan, chunk)
    return chunk


def at_pairs(p: Problem, plan: Plan, chunk: Chunk) -> None:
    """Logits at the pairs, gathered from dense ones where those hold them, else computed for the lists alone."""
    assert chunk.local is not None
    local, column = chunk.local, chunk.local.token - p.start
    need_final = not plan.softmax or plan.ragged_distill or plan.ragged_negatives
    need_layers = plan.streams > 1 and (plan.ragged_distill or plan.ragged_negatives)

    def gather(z: Tensor | None, columns: object) -> Tensor | None:
        if z is None:
            return None
        position, inside = columns.find(column)  # type: ignore[attr-defined]
        if not bool(inside.all()):
            return None
        flat = local.row * z.shape[-1] + position
        return z.reshape(-1).take(flat) if z.dim() == 2 else torch.stack([layer.reshape(-1).take(flat) for layer in z])

    if need_final:
        chunk.p_final = gather(chunk.z_final, plan.final)
    if need_layers:
        chunk.p_layers = gather(chunk.z_layers, plan.layers)
    grads_at_pairs = not plan.softmax or plan.ragged_distill
    missing = (need_final and chunk.p_final is None) or (need_layers and chunk.p_layers is None)
    if not (grads_at_pairs or missing):
        return
    chunk.ragged = RaggedHead(local.row, column, local.single, chunk.x.shape[0] * chunk.x.shape[2], plan.budget)
    if missing:
        first = 0 if need_final and chunk.p_final is None else 1
        last = chunk.x.shape[0] if need_layers and chunk.p_layers is None else 1
        z = chunk.ragged.logits(chunk.x[first:last], p.head)
        if first == 0:
            chunk.p_final, z = z[0], z[1:]
        if last > 1:
            chunk.p_layers = z


def collect_statistics(p: Problem, plan: Plan, chunk: Chunk, early: Tensor | None) -> None:
    """This rank's part of METHOD.md §7: candidates first, since normalisers leave them out; logits become exponentials in place."""
    stats = RankStats.zeros(chunk.n, plan.streams - 1, chunk.x.dtype, chunk.x.device)
    chunk.stats = stats
    if p.options.needs_negatives:
        find_candidates(p, plan, chunk, early)
    if plan.sliced:
        sliced.collect(p, plan, chunk)
    elif plan.fused:
        fused.collect(plan, chunk)
    if not plan.fused or plan.distill is None:
        distill_statistics(plan, chunk, stats)
    if plan.softmax and plan.fused:
        return
    if plan.softmax:
        z = chunk.z_final
        assert z is not None
        if z.shape[1]:
            stats.z_target = z[chunk.row, chunk.y].masked_fill_(~chunk.owned, 0.0)
        z.view(-1).index_fill_(0, chunk.sent.slot, -torch.inf)
        stats.top, stats.rest = exponentiate(z)
    else:
        z, local = chunk.p_final, chunk.local
        assert z is not None and local is not None
        stats.z_target[local.row[local.is_target]] = z[local.is_target]
        chunk.p_final = z = z.index_fill(0, chunk.sent.slot[chunk.sent.slot >= 0], -torch.inf)
        stats.top = segment_max(z, local.row, chunk.n)
        z.sub_(finite(stats.top).take(local.row)).exp_()
        stats.rest = segment_sum(z, local.row, chunk.n)


def exponentiate(z: Tensor) -> tuple[Tensor, Tensor]:
    """z [n, c] becomes e^(z − max) in place; returns (max [n], sum [n])."""
    top = z.amax(1) if z.shape[1] else z.new_full((z.shape[0],), -torch.inf)
    z.sub_(finite(top)[:, None]).exp_()
    return top, z.sum(1)


def find_candidates(p: Problem, plan: Plan, chunk: Chunk, early: Tensor | None) -> None:
    """Local candidates that may be in H, and the owner's z̄(y)."""
    assert chunk.stats is not None
    k, log_phi, stats = p.options.max_negatives, math.log(p.options.negative_threshold), chunk.stats
    final = p.options.negatives_from == "final"
    if plan.ragged_negatives:
        local, z = chunk.local, chunk.p_final
        assert local is not None and z is not None and chunk.pairs is not None
        value = z if final else mean(chunk.p_layers)
        stats.ensemble_target[local.row[local.is_target]] = value[local.is_target]
        bar = stats.ensemble_target if early is None else loosened(early)
        bar = (bar + log_phi).masked_fill(~local.has_target, torch.inf)
        entry = ((value >= bar.take(local.row)) & ~local.is_target).nonzero().flatten()
        if p.group is not None:
            entry = entry[keep_largest(local.row[entry], value[entry], chunk.n, k + 1, plan.budget)[0]]
        row, token = local.row.take(entry), local.token.take(entry)
        slot = entry
        if plan.softmax:
            assert plan.final is not None
            slot = row * len(plan.final) + plan.final.find(token - p.start)[0]
        chunk.sent = Sent(row, token, value.take(entry), z.take(entry), slot, entry)
        return
    columns, outer, source = plan.negatives, plan.final if final else plan.layers, chunk.z_final if final else chunk.z_layers
    assert columns is not None and outer is not None and source is not None and plan.final is not None and chunk.z_final is not None
    within = columns.within(outer)
    position, inside = columns.find(chunk.y)
    mine = (inside & chunk.owned).nonzero().flatten()
    if plan.fused and isinstance(within, slice):
        stack = (source[None] if final else source)[..., within]
        stats.ensemble_target[mine] = mean(stack[:, mine, position[mine]])
        bar = candidate_bar(p, chunk, stats, early)
        row, column, ensemble = fused.candidates(stack, bar, position.masked_fill(~(inside & chunk.owned), -1), k + 1)
        chunk.sent = dense_sent(p, plan, chunk, row, columns.local(column), ensemble)
        return
    value = select(source if final else source[0], within)
    borrowed = isinstance(within, slice) and (final or source.shape[0] == 1)
    if not final and source.shape[0] > 1:
        value = value + select(source[1], within)
        for layer in source[2:]:
            value += select(layer, within)
        value /= source.shape[0]
    position = position[mine]
    z_target = value[mine, position]
    stats.ensemble_target[mine] = z_target
    bar = candidate_bar(p, chunk, stats, early)
    value[mine, position] = -torch.inf  # y is excluded before the top-k
    row, column, ensemble = dense_candidates(value, bar, k + 1)
    if borrowed:
        value[mine, position] = z_target
    chunk.sent = dense_sent(p, plan, chunk, row, columns.local(column), ensemble)


def candidate_bar(p: Problem, chunk: Chunk, stats: RankStats, early: Tensor | None) -> Tensor:
    """[n] what z̄ must reach in the dense scope; +inf where y is no candidate."""
    bar = stats.ensemble_target if early is None else loosened(early)
    return (bar + math.log(p.options.negative_threshold)).masked_fill(~target_is_item(p, chunk), torch.inf)


def dense_sent(p: Problem, plan: Plan, chunk: Chunk, row: Tensor, column: Tensor, ensemble: Tensor) -> Sent:
    """The entries at local columns, with their final logits and where those sit."""
    assert plan.final is not None and chunk.z_final is not None
    slot = row * len(plan.final) + plan.final.find(column)[0]
    z, token = chunk.z_final.view(-1).take(slot), column + p.start
    if not plan.softmax:
        assert chunk.local is not None
        slot = chunk.local.find(row, token)
    return Sent(row, token, ensemble, z, slot)


def mean(layers: Tensor | None) -> Tensor:
    """z̄ of [m, P], added in the order L−1 … L−m."""
    assert layers is not None
    out = layers[0].clone()
    for layer in layers[1:]:
        out += layer
    return out.div_(layers.shape[0])


def loosened(early: Tensor) -> Tensor:
    """A bar a little under z̄(y) + log φ: the value comes from another product than the candidates'."""
    return early - 1e-3 * early.abs().clamp_(min=1.0)


def target_is_item(p: Problem, chunk: Chunk) -> Tensor:
    """bool [n]: the target is in the dense negative scope (of the whole vocabulary)."""
    y, items = p.targets[chunk.begin : chunk.end], p.options.item_tokens
    if p.options.negative_scope == "all" or items is None:
        return torch.ones_like(y, dtype=torch.bool)
    return torch.isin(y, items) if isinstance(items, Tensor) else (y >= items[0]) & (y < items[1])


def distill_statistics(plan: Plan, chunk: Chunk, stats: RankStats) -> None:
    """Per layer the maximum, the sum of exponentials and Σ e^(z^L − max)·(z^L − z^l) over the distill scope."""
    if plan.distill is not None:
        assert chunk.z_final is not None and chunk.z_layers is not None and plan.final is not None and plan.layers is not None
        z = select(chunk.z_final, plan.distill.within(plan.final))
        students = distill_students(plan, chunk)
        stats.teacher_top = z.amax(1) if z.shape[1] else z.new_full((chunk.n,), -torch.inf)
        chunk.teacher = torch.sub(z, finite(stats.teacher_top)[:, None]).exp_()
        stats.teacher_rest = chunk.teacher.sum(1)
        own = torch.linalg.vecdot(chunk.teacher, z)
        for i, student in enumerate(students):
            stats.cross[i] = own - torch.linalg.vecdot(chunk.teacher, student)
            stats.layer_top[i], stats.layer_rest[i] = exponentiate(student)
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
    """[m, n, c] of the layers' logits over the distill columns: a view, or (once) a compact copy where the columns are scattered."""
    assert chunk.z_layers is not None and plan.distill is not None and plan.layers is not None
    within = plan.distill.within(plan.layers)
    if isinstance(within, slice):
        return chunk.z_layers[..., within]
    if chunk.z_layers.shape[-1] != len(plan.distill):
        chunk.z_layers = chunk.z_layers.index_select(-1, within)
    return chunk.z_layers


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
