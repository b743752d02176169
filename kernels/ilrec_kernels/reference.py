"""The truth: METHOD.md §§2–6 over a whole rows × vocabulary matrix in plain torch, differentiated by autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels.layout.segments import set_key
from ilrec_kernels.options import LossOptions, RowStats, TokenLists, compute_dtype


@dataclass(frozen=True)
class Constants:
    """All that METHOD.md treats as stop-gradient; over [N, V]."""

    negatives: Tensor  # bool: H
    capped: Tensor  # [N] bool
    weight: Tensor  # w, 0 off H
    soft_label: Tensor  # q, 0 off H ∪ {y}
    covered: Tensor  # [N] bool
    teacher: Tensor  # log p^L over the distill scope, −inf off it


@dataclass(frozen=True)
class Scopes:
    """Boolean [N, V] masks."""

    valid_next: Tensor
    negatives: Tensor
    softmax: Tensor
    distill: Tensor
    target: Tensor


def scopes(targets: Tensor, candidates: TokenLists | None, options: LossOptions) -> Scopes:
    """Which tokens take part where. The masked softmax always holds the target, so its loss is never negative."""
    n, v = targets.numel(), options.vocab_size
    everything = torch.ones(n, v, dtype=torch.bool, device=targets.device)
    items = everything
    if options.item_tokens is not None:
        items = torch.zeros_like(everything)
        if isinstance(options.item_tokens, Tensor):
            items[:, options.item_tokens.to(items.device)] = True
        else:
            items[:, slice(*options.item_tokens)] = True
    valid = torch.zeros_like(everything)
    if candidates is not None:
        rows = torch.repeat_interleave(
            torch.arange(n, device=targets.device), candidates.indptr.diff()
        )
        valid[rows, candidates.tokens] = True
    target = torch.zeros_like(everything)
    target[torch.arange(n, device=targets.device), targets] = True
    by_name = {"all": everything, "item_tokens": items, "valid_next": valid}
    softmax = everything if options.softmax_scope == "all" else valid | target
    return Scopes(
        valid, by_name[options.negative_scope], softmax, by_name[options.distill_scope], target
    )


def constants(
    z: list[Tensor], scope: Scopes, rewards: Tensor | None, options: LossOptions
) -> Constants:
    """H, w, q and the teacher from logits z[s] [N, V] (final layer first, then L−1 … L−m). `rewards` is dense [N, V]."""
    z = [s.detach() for s in z]
    final, layers = z[0], z[1:]
    none = torch.zeros_like(scope.target)
    negatives, capped, weight, soft, covered = (
        none,
        none.any(1),
        torch.zeros_like(final),
        torch.zeros_like(final),
        none.any(1),
    )
    if options.needs_negatives:
        # METHOD.md §2: threshold, then the k largest; ties to the lower token id (a stable descending sort)
        ensemble = final if options.negatives_from == "final" else torch.stack(layers).mean(0)
        z_target = ensemble[scope.target][:, None]
        passed = (
            scope.negatives
            & ~scope.target
            & (ensemble >= z_target + math.log(options.negative_threshold))
        )
        passed &= (scope.negatives & scope.target).any(
            1, keepdim=True
        )  # a row whose y is no candidate has empty H
        order = (
            ensemble.masked_fill(~passed, -math.inf)
            .sort(dim=1, descending=True, stable=True)
            .indices[:, : options.max_negatives]
        )
        negatives = passed & none.scatter(1, order, True)
        capped = passed.sum(1) > options.max_negatives
        # §3: w = softmax over H of z̄
        weight = ensemble.masked_fill(~negatives, -math.inf).softmax(1).nan_to_num()
    if options.crr_lambda > 0:
        # §5: q over H ∪ {y}, as far as the softmax scope goes (elsewhere log p is −inf)
        assert rewards is not None
        support = negatives & scope.softmax
        covered = ((rewards > 0) & support).any(1)
        soft = (rewards + options.reward_floor) * (support | scope.target)
        soft = torch.where(
            covered[:, None], soft / soft.sum(1, keepdim=True), scope.target.to(soft.dtype)
        )
    teacher = final.masked_fill(~scope.distill, -math.inf).log_softmax(1)
    return Constants(negatives, capped, weight, soft, covered, teacher)


def row_losses(
    z: list[Tensor], scope: Scopes, fixed: Constants, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(cpo [N], kl [m, N], crr [N]), differentiable in z with `fixed` held."""
    final, layers = z[0], z[1:]
    outside = ~scope.softmax
    z_target = final[scope.target]
    # §3
    if options.penalty == "additive":
        adjusted = final + options.beta * fixed.weight
    else:
        adjusted = final * (1 + options.beta * fixed.weight)
    cpo = adjusted.masked_fill(outside, -math.inf).logsumexp(1) - z_target
    # §4; a scope without tokens has no divergence
    kl = []
    teacher = fixed.teacher.exp().nan_to_num()
    for layer in layers if options.mu > 0 else []:
        student = layer.masked_fill(~scope.distill, -math.inf)
        student = torch.where(scope.distill.any(1, keepdim=True), student, 0.0).log_softmax(1)
        kl.append(
            torch.where(
                scope.distill & (teacher > 0), teacher * (fixed.teacher - student), 0.0
            ).sum(1)
        )
    # §5
    log_p = final - final.masked_fill(outside, -math.inf).logsumexp(1, keepdim=True)
    crr = -(fixed.soft_label * log_p).sum(1) * fixed.negatives.any(1)
    empty = final.new_zeros(len(layers), final.shape[0])
    return cpo, torch.stack(kl) if kl else empty, crr


def dense_rewards(
    n: int,
    candidates: TokenLists | None,
    rewards: Tensor | None,
    options: LossOptions,
    dtype: torch.dtype,
) -> Tensor | None:
    """The sparse rewards as [N, V], zero elsewhere."""
    if candidates is None or rewards is None:
        return None
    rows = torch.repeat_interleave(torch.arange(n, device=rewards.device), candidates.indptr.diff())
    dense = torch.zeros(n, options.vocab_size, dtype=dtype, device=rewards.device)
    dense[rows, candidates.tokens] = rewards.to(dtype)
    return dense


def gather_head(
    head_weight: Tensor,
    vocab: tuple[int, int],
    options: LossOptions,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The whole head [V, d]; only this rank's rows are differentiable."""
    own = head_weight[: max(0, min(vocab[1], options.vocab_size) - vocab[0])]
    if group is None or dist.get_world_size(group) == 1:
        return own
    shards: list[Tensor | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shards, own.detach().cpu(), group=group)
    shards = [
        own if r == dist.get_rank(group) else s.to(own.device)
        for r, s in enumerate(shards)
        if s is not None
    ]
    return torch.cat([s for s in shards if s is not None])


def reference_rows(
    hidden: list[Tensor],
    head: Tensor,
    targets: Tensor,
    candidates: TokenLists | None,
    rewards: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, RowStats]:
    """Per-row losses [N], differentiable, and the statistics. `head` is the whole [V, d]; everything is upcast to fp64 before its matmul."""
    weight = head.double()
    z = [h.double() @ weight.T for h in hidden]
    scope = scopes(targets, candidates, options)
    fixed = constants(
        z,
        scope,
        dense_rewards(targets.numel(), candidates, rewards, options, torch.float64),
        options,
    )
    cpo, kl, crr = row_losses(z, scope, fixed, options)
    cpd = kl.mean(0) if kl.shape[0] else torch.zeros_like(cpo)
    dtype = compute_dtype(hidden[0])
    log_p = z[0].detach().masked_fill(~scope.softmax, -math.inf).log_softmax(1)
    members = fixed.negatives.nonzero(as_tuple=True)
    stats = RowStats(
        cpo=cpo.detach().to(dtype),
        cpd=cpd.detach().to(dtype),
        crr=crr.detach().to(dtype),
        kl=kl.detach().to(dtype),
        num_negatives=fixed.negatives.sum(1).to(dtype),
        capped=fixed.capped,
        valid_next_negatives=(fixed.negatives & scope.valid_next).sum(1).to(dtype),
        p_target=log_p[scope.target].exp().to(dtype),
        covered=fixed.covered,
        negatives_key=set_key(members[1], members[0], targets.numel()),
    )
    return cpo + options.mu * cpd + options.crr_lambda * crr, stats
