"""From every rank's statistics to the rows' losses (METHOD.md §7), with the sparse
terms.

Each rank merges in rank order and arrives at the same bits. The corrected
normaliser is a sum of positive parts, sum_exp + candidates outside H + Σ_H e^ẑ:
nothing is subtracted, so nothing cancels where H holds nearly all of the mass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.chunk import Chunk
from ilrec_kernels.layout.segments import (
    finite,
    row_counts,
    segment_logsumexp,
    segment_max,
    segment_sum,
    set_key,
)
from ilrec_kernels.options import LossOptions, RowStats
from ilrec_kernels.plan import Plan
from ilrec_kernels.problem import Problem
from ilrec_kernels.steps.softmax_stats import RankStats, logsumexp_over_ranks
from ilrec_kernels.steps.topk import keep_largest
from ilrec_kernels.steps.tp_exchange import Gathered


@dataclass(frozen=True)
class SparseTerms:
    """What the negatives add to a chunk's softmax (METHOD.md §§3, 5).

    Candidates outside H have weight and label 0.

    log_adjusted   log Σ e^ẑ over the softmax scope
    log_plain      log Σ e^z over it
    has_negatives  1.0 where H is not empty
    target_label   q(y)
    z_adjusted     ẑ at all candidates
    slope          dẑ/dz
    label          q
    """

    log_adjusted: Tensor  # [n]
    log_plain: Tensor  # [n]
    has_negatives: Tensor  # [n]
    target_label: Tensor  # [n]
    z_adjusted: Tensor  # [E]
    slope: Tensor  # [E]
    label: Tensor  # [E]


@dataclass(frozen=True)
class Merged:
    """What the gradients of a chunk need.

    log_teacher  log-normaliser of the final layer over the distill scope
    log_layer    those of the intermediate layers
    """

    gathered: Gathered
    terms: SparseTerms
    log_teacher: Tensor  # [n]
    log_layer: Tensor  # [m, n]

    def candidate_gradient(self, scale: Tensor, options: LossOptions) -> Tensor:
        """Return the final layer's gradient at this rank's candidates, in
        their order.
        """
        candidates, terms = self.gathered.candidates, self.terms
        everyone = (candidates.row, candidates.z, terms.z_adjusted, terms.slope, terms.label)
        row, z, z_adjusted, slope, label = (self.gathered.take_mine(v) for v in everyone)
        grad = torch.exp(z_adjusted - terms.log_adjusted.take(row)).mul_(slope)
        if options.crr_lambda > 0:
            soft = torch.exp(z - terms.log_plain.take(row)) - label
            grad += options.crr_lambda * terms.has_negatives.take(row) * soft
        return grad.mul_(scale.take(row))


def merge(p: Problem, plan: Plan, chunk: Chunk, gathered: Gathered, out: RowStats) -> Merged:
    """Select H exactly, correct the normalisers, write the rows' statistics
    to `out`.
    """
    stats, rows = gathered.stats, slice(chunk.begin, chunk.end)
    z_target = stats.z_target.sum(0)
    log_non_candidates = logsumexp_over_ranks(stats.row_max, stats.sum_exp)
    if plan.softmax.is_lists:
        # A row without entries has its target alone, which is never a candidate.
        log_non_candidates = torch.where(
            log_non_candidates == -torch.inf, z_target, log_non_candidates
        )
    if gathered.candidates.row.numel():
        terms = merge_candidates(p, plan, chunk, gathered, log_non_candidates, z_target, out)
    else:
        zero, none = torch.zeros_like(z_target), gathered.candidates.z
        terms = SparseTerms(
            log_non_candidates, log_non_candidates, zero, torch.ones_like(zero), none, none, none
        )
    out.cpo[rows] = terms.log_adjusted - z_target
    out.p_target[rows] = torch.exp(z_target - terms.log_plain)
    log_teacher, log_layer = stats.teacher_max[0], stats.layer_max[0]
    if p.num_layers and p.options.mu > 0:
        log_teacher, log_layer, kl = merge_distillation(stats)
        out.kl[:, rows] = kl
        out.cpd[rows] = kl.mean(0)
    return Merged(gathered, terms, log_teacher, log_layer)


def merge_candidates(
    p: Problem,
    plan: Plan,
    chunk: Chunk,
    gathered: Gathered,
    log_non_candidates: Tensor,
    z_target: Tensor,
    out: RowStats,
) -> SparseTerms:
    """Compute the sparse terms of a chunk with candidates.

    `log_non_candidates` [n] is the log-normaliser without the candidates, and
    `z_target` [n] is z^L(y).
    """
    candidates, n, rows = gathered.candidates, chunk.n, slice(chunk.begin, chunk.end)
    row, z = candidates.row, candidates.z
    member, capped = select_negatives(p, plan, gathered, n)
    count = segment_count(row, n, member).to(z.dtype)
    has_negatives = (count > 0).to(z.dtype)
    out.num_negatives[rows] = count
    out.capped[rows] = capped
    out.negatives_key[rows] = set_key(candidates.token, row, n, member)
    entry = in_softmax = None
    if plan.needs_entries:
        entry = candidates.entry
        if entry is None:
            entry = chunk.entries.find(row, candidates.token)
        if plan.negatives.is_lists:
            out.valid_next_negatives[rows] = count
        else:
            is_valid = masked((entry >= 0).to(z.dtype), member, 0.0)
            out.valid_next_negatives[rows] = segment_sum(is_valid, row, n)
            # Candidates from elsewhere than the lists may lie outside the masked softmax.
            in_softmax = entry >= 0 if plan.softmax.is_lists else None
    z_adjusted, slope = adjusted_logits(p, gathered, n, member)
    softmax_z = masked(z, in_softmax, -torch.inf)
    log_plain = torch.logaddexp(log_non_candidates, segment_logsumexp(softmax_z, row, n))
    softmax_z = masked(z_adjusted, in_softmax, -torch.inf)
    log_adjusted = torch.logaddexp(log_non_candidates, segment_logsumexp(softmax_z, row, n))
    label, target_label = torch.zeros_like(z), torch.ones_like(log_non_candidates)
    if p.options.crr_lambda > 0 and entry is not None:
        labelled = intersection(member, in_softmax)
        label, target_label, covered = soft_labels(p, chunk, row, entry, labelled)
        at_candidates = masked(label * (log_plain.take(row) - z), member, 0.0)
        crr = segment_sum(at_candidates, row, n) + target_label * (log_plain - z_target)
        out.crr[rows] = crr * has_negatives
        out.covered[rows] = covered
    return SparseTerms(
        log_adjusted, log_plain, has_negatives, target_label, z_adjusted, slope, label
    )


def merge_distillation(stats: RankStats) -> tuple[Tensor, Tensor, Tensor]:
    """Return the teacher's log-normaliser [n], the layers' [m, n], and the
    KL [m, n].
    """
    log_teacher = logsumexp_over_ranks(stats.teacher_max, stats.teacher_sum)
    log_layer = logsumexp_over_ranks(stats.layer_max, stats.layer_sum)
    is_empty = log_teacher == -torch.inf
    share = torch.exp(stats.teacher_max - log_teacher).masked_fill(is_empty, 0.0).nan_to_num_()
    normalisers = (log_teacher - log_layer).masked_fill(is_empty, 0.0).nan_to_num_()
    return log_teacher, log_layer, (share[:, None] * stats.cross).sum(0) - normalisers


def masked(values: Tensor, mask: Tensor | None, other: float) -> Tensor:
    """Return `values` where the mask holds, else `other`; None holds everywhere."""
    return values if mask is None else values.masked_fill(~mask, other)


def intersection(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return where both masks hold; None holds everywhere."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def segment_count(row: Tensor, n: int, member: Tensor | None) -> Tensor:
    """Return how many members each row has, int64 [n]."""
    return row_counts(row, n) if member is None else segment_sum(member.long(), row, n)


def select_negatives(
    p: Problem, plan: Plan, gathered: Gathered, n: int
) -> tuple[Tensor | None, Tensor]:
    """Return which candidates are H, bool [E] or None for all, and the
    capped rows [n].
    """
    candidates, k = gathered.candidates, p.options.max_negatives
    if candidates.selection is not None:
        return candidates.selection.member, candidates.selection.capped
    ensemble_target = gathered.stats.ensemble_target.sum(0)
    threshold = ensemble_target + math.log(p.options.negative_threshold)
    row = candidates.row
    member = candidates.ensemble >= threshold.take(row)
    capped = segment_sum(member.long(), row, n) > k
    if not bool(capped.any()):
        return member, capped
    passed = member.nonzero().flatten()
    keep, _ = keep_largest(row.take(passed), candidates.ensemble.take(passed), n, k, plan.budget)
    if keep is not None:
        member = torch.zeros_like(member).index_fill_(0, passed.take(keep), True)
    return member, capped


def adjusted_logits(
    p: Problem, gathered: Gathered, n: int, member: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ẑ and dẑ/dz at the candidates [E] (METHOD.md §3)."""
    candidates, beta = gathered.candidates, p.options.beta
    weight = penalty_weights(candidates.row, masked(candidates.ensemble, member, -torch.inf), n)
    if p.options.penalty == "additive":
        return candidates.z + beta * weight, torch.ones_like(candidates.z)
    slope = 1 + beta * weight
    return candidates.z * slope, slope


def penalty_weights(row: Tensor, ensemble: Tensor, n: int) -> Tensor:
    """Return w [E]: the softmax of z̄ over each row's candidates, where z̄ is −inf off
    H.
    """
    weight = torch.exp(ensemble - finite(segment_max(ensemble, row, n)).take(row))
    tiny = torch.finfo(weight.dtype).tiny
    return weight.div_(segment_sum(weight, row, n).clamp_(min=tiny).take(row))


def soft_labels(
    p: Problem, chunk: Chunk, row: Tensor, entry: Tensor, member: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q at the candidates [E] and at the target [n], and the covered rows, bool
    [n].

    METHOD.md §5. `entry` int64 [E] is the candidate's index among the rows' entries, −1
    where it is none.
    """
    entries, n = chunk.entries, chunk.n
    target_entry = torch.full((n,), -1, dtype=torch.int64, device=row.device)
    target_entry[entries.target_row] = entries.target
    rewards = masked(entry_rewards(p, chunk, entry), member, 0.0)
    covered = segment_max(rewards, row, n) > 0
    label = masked(rewards + p.options.reward_floor, member, 0.0)
    target_label = entry_rewards(p, chunk, target_entry) + p.options.reward_floor
    total = segment_sum(label, row, n) + target_label
    # The label is 0 in rows that are not covered.
    label = label * (covered / total).take(row)
    return label, torch.where(covered, target_label / total, 1.0), covered


def entry_rewards(p: Problem, chunk: Chunk, entry: Tensor) -> Tensor:
    """Return the rewards of entries, 0 for −1 and for targets that their lists lack."""
    source = torch.full_like(entry, -1)
    if chunk.entries.source.numel():
        source = chunk.entries.source.take(entry.clamp(min=0))
    source.masked_fill_(entry < 0, -1)
    values = torch.zeros_like(source)
    if p.rewards.numel():
        values = p.rewards.take(source.clamp(min=0))
    return values.to(p.dtype).masked_fill_(source < 0, 0.0)
