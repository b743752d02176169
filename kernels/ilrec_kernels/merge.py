"""From every rank's statistics to the rows' losses: the merge of METHOD.md §7, and the sparse terms of §§3 and 5."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.exchange import Gathered
from ilrec_kernels.pairs import Pairs
from ilrec_kernels.problem import Plan, Problem
from ilrec_kernels.segments import (
    finite,
    row_counts,
    segment_logsumexp,
    segment_max,
    segment_sum,
    set_key,
)
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
        row, z, z_adjusted, slope, label = (
            values if self.mine is None else (v.take(self.mine) for v in values)
        )
        grad = torch.exp(z_adjusted - self.adjusted.take(row)).mul_(slope)
        if options.crr_lambda > 0:
            grad += (
                options.crr_lambda
                * self.some.take(row)
                * (torch.exp(z - self.plain.take(row)) - label)
            )
        return grad.mul_(scale.take(row))


def over_ranks(top: Tensor, rest: Tensor) -> Tensor:
    """logsumexp from per-rank (max, sum of exponentials) [R, …]."""
    if top.shape[0] == 1:
        return top[0] + rest[0].log()
    highest = finite(top.amax(0))
    return highest + (rest * torch.exp(top - highest)).sum(0).log()


def merge(
    p: Problem, plan: Plan, pairs: Pairs | None, g: Gathered, begin: int, end: int, write: RowStats
) -> Merged:
    """Exact selection, corrected normalisers, losses; writes the rows' statistics at [begin, end)."""
    o, stats, n = p.options, g.stats, end - begin
    m = stats.layer_top.shape[1]
    z_target, ensemble_target = stats.z_target.sum(0), stats.ensemble_target.sum(0)
    rest = over_ranks(stats.top, stats.rest)
    row, z = g.row, g.z
    zero = torch.zeros_like(z_target)
    slope, label, z_adjusted, target_label, some = (
        torch.ones_like(z),
        torch.zeros_like(z),
        z,
        torch.ones_like(zero),
        zero,
    )
    adjusted = plain = rest
    if not plan.softmax:  # a row without pairs has its target alone; the target is never sent
        rest = adjusted = plain = torch.where(rest == -torch.inf, z_target, rest)
    if row.numel():
        member, capped = choose(p, plan, g, ensemble_target, n)
        weight = soft_weights(row, only(g.ensemble, member, -torch.inf), n)
        found = None
        if plan.pairs:
            assert pairs is not None
            found = g.pair if g.pair is not None else pairs.find(row, g.token)
        # entries from elsewhere than the lists may lie outside the masked softmax
        inside = None if plan.softmax or found is None or plan.ragged_negatives else found >= 0
        count = (row_counts(row, n) if member is None else segment_sum(member.long(), row, n)).to(
            z.dtype
        )
        some = (count > 0).to(z.dtype)
        if o.penalty == "additive":
            z_adjusted = z + o.beta * weight
        else:
            slope = 1 + o.beta * weight
            z_adjusted = z * slope
        plain = torch.logaddexp(rest, segment_logsumexp(only(z, inside, -torch.inf), row, n))
        adjusted = torch.logaddexp(
            rest, segment_logsumexp(only(z_adjusted, inside, -torch.inf), row, n)
        )
        if o.crr_lambda > 0:
            label, target_label, covered = soft_labels(
                p, pairs, row, found, both(member, inside), begin, end
            )
            crr = segment_sum(
                only(label * (plain.take(row) - z), member, 0.0), row, n
            ) + target_label * (plain - z_target)
            write.crr[begin:end] = crr * some
            write.covered[begin:end] = covered
        write.num_negatives[begin:end] = count
        write.negatives_key[begin:end] = set_key(g.token, row, n, member)
        write.capped[begin:end] = capped
        if found is not None:
            real = (
                count
                if plan.ragged_negatives
                else segment_sum(only((found >= 0).to(z.dtype), member, 0.0), row, n)
            )
            write.valid_next_negatives[begin:end] = real
    write.cpo[begin:end] = adjusted - z_target
    write.p_target[begin:end] = torch.exp(z_target - plain)
    teacher, layer = zero, stats.layer_top[0]
    if m and o.mu > 0:
        teacher = over_ranks(stats.teacher_top, stats.teacher_rest)
        layer = over_ranks(stats.layer_top, stats.layer_rest)
        nothing = teacher == -torch.inf  # an empty scope
        share = torch.exp(stats.teacher_top - teacher).masked_fill(nothing, 0.0).nan_to_num_()
        kl = (share[:, None] * stats.cross).sum(0) - (teacher - layer).masked_fill(
            nothing, 0.0
        ).nan_to_num_()
        write.kl[:, begin:end] = kl
        write.cpd[begin:end] = kl.mean(0)
    return Merged(
        adjusted,
        plain,
        teacher,
        layer,
        some,
        target_label,
        row,
        z,
        z_adjusted,
        slope,
        label,
        g.mine,
    )


def only(values: Tensor, mask: Tensor | None, other: float) -> Tensor:
    """`values` where the mask holds, else `other`; a mask of None holds everywhere."""
    return values if mask is None else values.masked_fill(~mask, other)


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b


def choose(
    p: Problem, plan: Plan, g: Gathered, ensemble_target: Tensor, n: int
) -> tuple[Tensor | None, Tensor]:
    """(which entries are H, bool [E] or None for all; rows that had more than k, bool [n])."""
    if g.over is not None:
        return g.member, g.over
    bar = ensemble_target + math.log(p.options.negative_threshold)
    member = g.ensemble >= bar.take(g.row)
    over = segment_sum(member.long(), g.row, n) > p.options.max_negatives
    if not bool(over.any()):
        return member, over
    passed = member.nonzero().flatten()
    keep, _ = keep_largest(
        g.row.take(passed), g.ensemble.take(passed), n, p.options.max_negatives, plan.budget
    )
    if keep is not None:
        member = torch.zeros_like(member).index_fill_(0, passed.take(keep), True)
    return member, over


def soft_weights(row: Tensor, value: Tensor, n: int) -> Tensor:
    """w [E]: softmax of z̄ over each row's entries, −inf off H."""
    weight = torch.exp(value - finite(segment_max(value, row, n)).take(row))
    return weight.div_(
        segment_sum(weight, row, n).clamp_(min=torch.finfo(weight.dtype).tiny).take(row)
    )


def soft_labels(
    p: Problem,
    pairs: Pairs | None,
    row: Tensor,
    found: Tensor | None,
    member: Tensor | None,
    begin: int,
    end: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q at the entries [E] and at the target [n], and whether the row is covered, bool [n] (METHOD.md §5)."""
    assert pairs is not None and found is not None and p.rewards is not None
    n, dtype = end - begin, p.dtype

    def reward(position: Tensor) -> Tensor:
        source = (
            pairs.source.take(position.clamp(min=0))
            if pairs.source.numel()
            else torch.full_like(position, -1)
        )
        source.masked_fill_(position < 0, -1)
        values = (
            p.rewards.take(source.clamp(min=0)) if p.rewards.numel() else torch.zeros_like(source)
        )  # type: ignore[union-attr]
        return values.to(dtype).masked_fill_(source < 0, 0.0)

    at_target = torch.full((n,), -1, dtype=torch.int64, device=row.device)
    at_target[pairs.target_row] = pairs.target
    scored = only(reward(found), member, 0.0)
    covered = segment_max(scored, row, n) > 0
    label = only(scored + p.options.reward_floor, member, 0.0)
    own = reward(at_target) + p.options.reward_floor
    total = segment_sum(label, row, n) + own
    label = label * (covered / total).take(row)  # 0 in uncovered rows
    return label, torch.where(covered, own / total, 1.0), covered
