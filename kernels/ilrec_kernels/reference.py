"""The truth: METHOD.md §§2–6 over whole rows × vocabulary logits, by autograd.

It is written for reading, not for speed; the other backends are tested against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels.layout.segments import set_key
from ilrec_kernels.options import LossOptions, RowStats, TokenLists, compute_dtype


@dataclass(frozen=True)
class Scopes:
    """Which tokens take part where, bool [N, V] each; `target` marks y."""

    valid_next: Tensor
    negatives: Tensor
    softmax: Tensor
    distill: Tensor
    target: Tensor


@dataclass(frozen=True)
class Constants:
    """All that METHOD.md treats as stop-gradient.

    negatives   H
    weight      w, 0 off H
    soft_label  q, 0 off H ∪ {y}
    teacher     log p^L over the distill scope, −inf off it
    """

    negatives: Tensor  # bool [N, V]
    capped: Tensor  # bool [N]
    weight: Tensor  # [N, V]
    soft_label: Tensor  # [N, V]
    covered: Tensor  # bool [N]
    teacher: Tensor  # [N, V]


def scopes(targets: Tensor, candidates: TokenLists | None, options: LossOptions) -> Scopes:
    """Mark the tokens of each scope.

    The masked softmax always holds the target, so its loss is never negative.
    """
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
        valid[_list_rows(candidates), candidates.tokens] = True
    target = torch.zeros_like(everything)
    target[torch.arange(n, device=targets.device), targets] = True
    by_name = {"all": everything, "item_tokens": items, "valid_next": valid}
    softmax = everything if options.softmax_scope == "all" else valid | target
    return Scopes(
        valid, by_name[options.negative_scope], softmax, by_name[options.distill_scope], target
    )


def constants(z: list[Tensor], scope: Scopes, rewards: Tensor, options: LossOptions) -> Constants:
    """Compute H, w, q and the teacher.

    z[s] [N, V] are logits, the final layer's first, then L−1 … L−m; `rewards` is dense
    [N, V].
    """
    z = [s.detach() for s in z]
    final, layers = z[0], z[1:]
    nothing = torch.zeros_like(scope.target)
    negatives, capped, covered = nothing, nothing.any(1), nothing.any(1)
    weight, soft = torch.zeros_like(final), torch.zeros_like(final)
    if options.needs_negatives:
        ensemble = final if options.negatives_from == "final" else torch.stack(layers).mean(0)
        negatives, capped = select_negatives(ensemble, scope, options)
        if options.negatives_from == "random":
            negatives = random_negatives(negatives.sum(1), scope)
        # §3: w is the softmax over H of z̄.
        weight = ensemble.masked_fill(~negatives, -math.inf).softmax(1).nan_to_num()
    if options.crr_lambda > 0:
        # §5: q lives on H ∪ {y} as far as the softmax scope goes; elsewhere log p is −inf.
        support = negatives & scope.softmax
        covered = ((rewards > 0) & support).any(1)
        soft = (rewards + options.reward_floor) * (support | scope.target)
        soft = torch.where(
            covered[:, None], soft / soft.sum(1, keepdim=True), scope.target.to(soft.dtype)
        )
    teacher = final.masked_fill(~scope.distill, -math.inf).log_softmax(1)
    return Constants(negatives, capped, weight, soft, covered, teacher)


def select_negatives(
    ensemble: Tensor, scope: Scopes, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Return H, bool [N, V], and which rows
    had more than k candidates, bool [N] (§2).
    """
    threshold = ensemble[scope.target][:, None] + math.log(options.negative_threshold)
    passed = scope.negatives & ~scope.target & (ensemble >= threshold)
    # A row whose y is no candidate has an empty H.
    passed &= (scope.negatives & scope.target).any(1, keepdim=True)
    # A stable descending sort lets ties go to the lower token id.
    order = ensemble.masked_fill(~passed, -math.inf).sort(dim=1, descending=True, stable=True)
    largest = order.indices[:, : options.max_negatives]
    negatives = passed & torch.zeros_like(passed).scatter(1, largest, True)
    return negatives, passed.sum(1) > options.max_negatives


def random_negatives(counts: Tensor, scope: Scopes) -> Tensor:
    """Return `counts` [N] tokens of each row, drawn
    from its candidates without y, bool [N, V].

    torch's generator draws them: no two calls agree unless it is seeded.
    """
    draws = torch.rand(scope.target.shape, dtype=torch.float64, device=counts.device)
    draws = draws.masked_fill(~scope.negatives | scope.target, math.inf)
    return draws.argsort(1).argsort(1) < counts[:, None]


def row_losses(
    z: list[Tensor], scope: Scopes, fixed: Constants, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (cpo [N], kl [m, N], crr [N]), differentiable in z with `fixed` held."""
    final, layers = z[0], z[1:]
    outside = ~scope.softmax
    # §3
    if options.penalty == "additive":
        adjusted = final + options.beta * fixed.weight
    else:
        adjusted = final * (1 + options.beta * fixed.weight)
    cpo = adjusted.masked_fill(outside, -math.inf).logsumexp(1) - final[scope.target]
    # §4
    kl = [_divergence(layer, scope, fixed) for layer in layers] if options.mu > 0 else []
    # §5
    log_p = final - final.masked_fill(outside, -math.inf).logsumexp(1, keepdim=True)
    crr = -(fixed.soft_label * log_p).sum(1) * fixed.negatives.any(1)
    no_kl = final.new_zeros(len(layers), final.shape[0])
    return cpo, torch.stack(kl) if kl else no_kl, crr


def _divergence(layer: Tensor, scope: Scopes, fixed: Constants) -> Tensor:
    """Return KL(p^L ‖ p^l) [N] over the distill scope, 0 where that has no tokens."""
    teacher = fixed.teacher.exp().nan_to_num()
    student = layer.masked_fill(~scope.distill, -math.inf)
    student = torch.where(scope.distill.any(1, keepdim=True), student, 0.0).log_softmax(1)
    terms = teacher * (fixed.teacher - student)
    return torch.where(scope.distill & (teacher > 0), terms, 0.0).sum(1)


def dense_rewards(
    n: int,
    candidates: TokenLists | None,
    rewards: Tensor | None,
    options: LossOptions,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Tensor:
    """Return the lists' rewards as [N, V], 0 elsewhere."""
    dense = torch.zeros(n, options.vocab_size, dtype=dtype, device=device)
    if candidates is not None and rewards is not None:
        dense[_list_rows(candidates), candidates.tokens] = rewards.to(dtype)
    return dense


def _list_rows(lists: TokenLists) -> Tensor:
    """Return the row of each of the lists' tokens, int64 [nnz]."""
    lengths = lists.indptr.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def gather_head(
    head_weight: Tensor,
    vocab: tuple[int, int],
    options: LossOptions,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Return the whole head [V, d], of which
    only this rank's rows are differentiable.
    """
    mine = head_weight[: max(0, min(vocab[1], options.vocab_size) - vocab[0])]
    if group is None:
        return mine
    shards: list[Tensor | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shards, mine.detach().cpu(), group=group)
    rank = dist.get_rank(group)
    return torch.cat(
        [
            mine if r == rank else shard.to(mine.device)
            for r, shard in enumerate(shards)
            if shard is not None
        ]
    )


def reference_rows(
    hidden: list[Tensor],
    head: Tensor,
    targets: Tensor,
    candidates: TokenLists | None,
    rewards: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, RowStats]:
    """Return the rows' losses [N], differentiable, and their statistics.

    `head` is the whole [V, d]; everything is upcast to fp64 before its product.
    """
    n, weight = targets.numel(), head.double()
    z = [h.double() @ weight.T for h in hidden]
    scope = scopes(targets, candidates, options)
    dense = dense_rewards(n, candidates, rewards, options, torch.float64, targets.device)
    fixed = constants(z, scope, dense, options)
    cpo, kl, crr = row_losses(z, scope, fixed, options)
    cpd = kl.mean(0) if kl.shape[0] else torch.zeros_like(cpo)
    dtype = compute_dtype(hidden[0])
    log_p = z[0].detach().masked_fill(~scope.softmax, -math.inf).log_softmax(1)
    row, token = fixed.negatives.nonzero(as_tuple=True)
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
        negatives_key=set_key(token, row, n),
    )
    return cpo + options.mu * cpd + options.crr_lambda * crr, stats
