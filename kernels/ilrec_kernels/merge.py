"""From every rank's statistics to the rows' losses: the merge of METHOD.md §7, and the sparse terms of §§3 and 5."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.exchange import Gathered
from ilrec_kernels.pairs import Pairs
from ilrec_kernels.problem import Plan, Problem
from ilrec_kernels.segments import finite, segment_logsumexp, segment_max, segment_sum, set_key
from ilrec_kernels.select import keep_largest
from ilrec_kernels.types import LossOptions, RowStats


@dataclass
class Merged:
    """What the gradients of a chunk need. Entries are all proposed ones; those not in H have weight and label 0."""

    adjusted: Tensor  # [n] log Σ e^ẑ over the softmax scope
    plain: Tensor  # [n] log Σ e^z
    teacher: Tensor  # [n] log-normaliser of the final layer over the distill scope
    layer: Tensor  # [m, n] the layers'
    some: Tensor  # [n] 1.0 where H is not empty
    target_label: Tensor  # [n] q(y)
    row: Tensor
    z: Tensor
    z_adjusted: Tensor
    slope: Tensor  # dẑ/dz
    label: Tensor  # q
    mine: Tensor | None

    def sent_gradient(self, scale: Tensor, options: LossOptions) -> Tensor:
        """[E of this rank] the gradient at the final layer's logits of the entries this rank sent, in their order."""
        values = (self.row, self.z, self.z_adjusted, self.slope, self.label)
        row, z, z_adjusted, slope, label = values if self.mine is None else (v.take(self.mine) for v in values)
        grad = torch.exp(z_adjusted - self.adjusted.take(row)).mul_(slope)
        if options.crr_lambda > 0:
            grad += options.crr_lambda * self.some.take(row) * (torch.exp(z - self.plain.take(row)) - label)
        return grad.mul_(scale.take(row))


def over_ranks(top: Tensor, rest: Tensor) -> Tensor:
    """logsumexp from per-rank (max, sum of exponentials) [R, …]."""
    if top.shape[0] == 1:
        return top[0] + rest[0].log()
    highest = finite(top.amax(0))
    return highest + (rest * torch.exp(top - highest)).sum(0).log()


def merge(p: Problem, plan: Plan, pairs: Pairs | None, g: Gathered, begin: int, end: int, write: RowStats) -> Merged:
    """Exact selection, corrected normalisers, losses; writes the rows' statistics at [begin, end)."""
    o, stats, n = p.options, g.stats, end - begin
    m = stats.layer_top.shape[1]
    z_target, ensemble_target = stats.z_target.sum(0), stats.ensemble_target.sum(0)
    rest = over_ranks(stats.top, stats.rest)
    row, z = g.row, g.z
    zero = torch.zeros_like(z_target)
    slope, label, z_adjusted, target_label, some = torch.ones_like(z), torch.zeros_like(z), z, torch.ones_like(zero), zero
    adjusted = plain = rest
    if not plan.softmax:  # a row without pairs has its target alone; the target is never sent
        rest = adjusted = plain = torch.where(rest == -torch.inf, z_target, rest)
    if row.numel():
        member, weight, inside, found, capped = choose(p, plan, pairs, g, ensemble_target, n)
        count = segment_sum(member.to(z.dtype), row, n)
        some = (count > 0).to(z.dtype)
        if o.penalty == "additive":
            z_adjusted = z + o.beta * weight
        else:
            slope = 1 + o.beta * weight
            z_adjusted = z * slope
        z_in, adjusted_in = z.masked_fill(~inside, -torch.inf), z_adjusted.masked_fill(~inside, -torch.inf)
        plain = torch.logaddexp(rest, segment_logsumexp(z_in, row, n))
        adjusted = torch.logaddexp(rest, segment_logsumexp(adjusted_in, row, n))
        if o.crr_lambda > 0:
            label, target_label, covered = soft_labels(p, pairs, row, found, member & inside, begin, end)
            crr = segment_sum(label * (plain.take(row) - z), row, n) + target_label * (plain - z_target)
            write.crr[begin:end] = crr * some
            write.covered[begin:end] = covered
        write.num_negatives[begin:end] = count
        write.negatives_key[begin:end] = set_key(g.token[member], row[member], n)
        write.capped[begin:end] = capped
        if found is not None:
            assert pairs is not None
            real = (found >= 0) & member
            write.valid_next_negatives[begin:end] = segment_sum(real.to(z.dtype), row, n)
    write.cpo[begin:end] = adjusted - z_target
    write.p_target[begin:end] = torch.exp(z_target - plain)
    teacher, layer = zero, stats.layer_top[0]
    if m and o.mu > 0:
        teacher = over_ranks(stats.teacher_top, stats.teacher_rest)
        layer = over_ranks(stats.layer_top, stats.layer_rest)
        nothing = teacher == -torch.inf  # an empty scope
        share = torch.exp(stats.teacher_top - teacher).masked_fill(nothing, 0.0).nan_to_num_()
        kl = (share[:, None] * stats.cross).sum(0) - (teacher - layer).masked_fill(nothing, 0.0).nan_to_num_()
        write.kl[:, begin:end] = kl
        write.cpd[begin:end] = kl.mean(0)
    return Merged(adjusted, plain, teacher, layer, some, target_label, row, z, z_adjusted, slope, label, g.mine)


def choose(p: Problem, plan: Plan, pairs: Pairs | None, g: Gathered, ensemble_target: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(member bool [E], w [E], in the softmax scope bool [E], position among the pairs [E] or None, capped bool [n])."""
    row, ensemble = g.row, g.ensemble
    bar = ensemble_target + math.log(p.options.negative_threshold)
    member = ensemble >= bar.take(row)
    passed = member.nonzero().flatten()
    keep, capped = keep_largest(row.take(passed), ensemble.take(passed), n, p.options.max_negatives, plan.budget)
    member[passed[~keep]] = False
    # w: softmax of z̄ over H
    value = ensemble.masked_fill(~member, -torch.inf)
    weight = torch.exp(value - finite(segment_max(value, row, n)).take(row))
    weight /= segment_sum(weight, row, n).clamp_(min=torch.finfo(weight.dtype).tiny).take(row)
    found = None
    if plan.pairs:
        assert pairs is not None
        found = g.pair if g.pair is not None else pairs.find(row, g.token)
    inside = torch.ones_like(member) if plan.softmax or found is None else found >= 0
    return member, weight, inside, found, capped


def soft_labels(p: Problem, pairs: Pairs | None, row: Tensor, found: Tensor | None, member: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """q at the entries [E] and at the target [n], and whether the row is covered, bool [n] (METHOD.md §5)."""
    assert pairs is not None and found is not None and p.rewards is not None
    n, dtype = end - begin, p.dtype

    def reward(position: Tensor) -> Tensor:
        source = pairs.source.take(position.clamp(min=0)) if pairs.source.numel() else torch.full_like(position, -1)
        known = (position >= 0) & (source >= 0)
        values = p.rewards.take(source.clamp(min=0)) if p.rewards.numel() else torch.zeros_like(source)  # type: ignore[union-attr]
        return values.to(dtype).masked_fill_(~known, 0.0)

    at_target = torch.full((n,), -1, dtype=torch.int64, device=row.device)
    mine = pairs.is_target.nonzero().flatten()
    at_target[pairs.row.take(mine)] = mine
    scored = reward(found).masked_fill_(~member, 0.0)
    covered = segment_max(scored, row, n) > 0
    label = (scored + p.options.reward_floor).masked_fill_(~member, 0.0)
    own = reward(at_target) + p.options.reward_floor
    total = segment_sum(label, row, n) + own
    label = (label / total.take(row)).masked_fill_(~covered.take(row), 0.0)
    return label, torch.where(covered, own / total, 1.0), covered
