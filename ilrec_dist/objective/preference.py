"""Preference losses (METHOD.md §11): a target is preferred to negative items.

Every loss reads log π(i | x), the sum of an item's log p^L over the softmax scope,
and most of them Δ_i = log π(i | x) − log π_ref(i | x) with a frozen reference π_ref.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from ilrec_kernels import TokenLists, cross_layer_loss
from torch import Tensor

from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.model.branches import BranchedSequences
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.objective.config import ObjectiveConfig, PreferenceConfig
from ilrec_dist.objective.ilrec import loss_options
from ilrec_dist.objective.objective import Objective
from ilrec_dist.objective.preference_statistics import PreferenceStatistics, TargetStats


@dataclass(frozen=True)
class PairScores:
    """What the losses read of T targets with n negatives each."""

    # log π of each target [T] and of its negatives [T, n].
    target: Tensor
    negatives: Tensor
    # Tokens of each, as real numbers.
    target_length: Tensor  # [T]
    negative_lengths: Tensor  # [T, n]
    # log π_ref; zeros where the loss reads no reference.
    reference_target: Tensor  # [T]
    reference_negatives: Tensor  # [T, n]
    # ε: the probability that the negative is the better one; zeros where no loss reads it.
    flip: Tensor  # [T]

    @property
    def margins(self) -> Tensor:
        """Δ_y − Δ_n, [T, n]."""
        target = self.target - self.reference_target
        return target[:, None] - (self.negatives - self.reference_negatives)


class PreferenceLoss(ABC):
    """The loss of each target from the scores of its continuations."""

    def __init__(self, config: PreferenceConfig) -> None:
        if config.beta is None:
            raise ValueError("preference.beta: expected a number here, got None")
        self.beta, self.gamma = config.beta, config.gamma

    @abstractmethod
    def __call__(self, scores: PairScores) -> Tensor:
        """The loss of each target, [T], differentiable in the scores."""


class DPO(PreferenceLoss):
    """−log σ(β(Δ_y − Δ_n)), of one negative (arXiv 2305.18290)."""

    def __call__(self, scores: PairScores) -> Tensor:
        return -F.logsigmoid(self.beta * scores.margins[:, 0])


class SoftmaxDPO(PreferenceLoss):
    """−log σ(−log Σ_n exp β(Δ_n − Δ_y)), of
    several negatives (S-DPO, arXiv 2406.09215).
    """

    def __call__(self, scores: PairScores) -> Tensor:
        return -F.logsigmoid(-(-self.beta * scores.margins).logsumexp(dim=1))


class SimPO(PreferenceLoss):
    """−log σ(β·log π(y)/|y| − β·log π(n)/|n| −
    γ), without a reference (arXiv 2405.14734).
    """

    def __call__(self, scores: PairScores) -> Tensor:
        target = scores.target / scores.target_length
        negative = scores.negatives[:, 0] / scores.negative_lengths[:, 0]
        return -F.logsigmoid(self.beta * (target - negative) - self.gamma)


class SmoothedDPO(PreferenceLoss):
    """−(1−ε)·log σ(βd) − ε·log σ(−βd) with d = Δ_y − Δ_n (RosePO, arXiv 2410.12519).

    ε is each target's own: the probability that
    the collaborative model gives n above y.
    """

    def __call__(self, scores: PairScores) -> Tensor:
        d = self.beta * scores.margins[:, 0]
        return -(1 - scores.flip) * F.logsigmoid(d) - scores.flip * F.logsigmoid(-d)


@dataclass(frozen=True)
class PreferenceOutput:
    """loss: the sum over targets times the loss
    scale; rows: what happened in each target.
    """

    loss: Tensor
    rows: TargetStats


class PreferenceObjective(Objective):
    """The backbone and a preference loss over the continuations of each history.

    Without negatives the loss is the targets' cross-entropy.
    """

    terms = ()

    def __init__(
        self,
        backbone: Backbone,
        config: ObjectiveConfig,
        loss: PreferenceLoss,
        catalogue: Catalogue,
        parallel: ParallelState,
    ) -> None:
        super().__init__(backbone, config.softmax_scope, parallel)
        self.loss, self.depth = loss, catalogue.depth
        plain = dataclasses.replace(config, cpo_beta=0.0, cpd_mu=0.0, crr_lambda=0.0)
        self.options = loss_options(plain, catalogue.vocab_size, catalogue.used_tokens())

    def make_statistics(self, depth: int) -> PreferenceStatistics:
        return PreferenceStatistics(self.parallel.device)

    def scores(
        self,
        tokens: Tensor,
        rows: Tensor,
        targets: Tensor,
        indptr: Tensor,
        candidates: Tensor,
        cell: Tensor,
        num_targets: int,
        num_negatives: int,
        branches: BranchedSequences | None,
        known: Tensor | None,
    ) -> PairScores:
        """log π of every target and negative,
        differentiable, and what is known of them.

        tokens int64 [B, S]; rows, targets and cell int64 [N]; candidates in CSR form,
        indptr int64 [N + 1]. Of T · (1 + n) continuations the targets come first, then
        each target's negatives side by side; a row's cell is continuation · C +
        position in the item. known float32 [T, 1 + n + …]: log π_ref of the target and
        its negatives, then ε where the loss reads it.

        The operator gives each row's −log p over the vocabulary's shards, without
        a tensor of rows × vocabulary, and makes its gradients in backward.
        """
        hidden = self.backbone(tokens, rows, branches=branches)
        negative_log_p = cross_layer_loss(
            hidden.final,
            [],
            self.backbone.head_weight,
            targets,
            TokenLists(indptr, candidates),
            None,
            self.options,
            vocab=self.backbone.vocab_range,
            trainable_rows=self.backbone.trainable_head_rows,
            trained_rows=self.backbone.trained_head_rows,
            tp_group=self.parallel.tp_group if self.parallel.tp > 1 else None,
            reduction="none",
        ).loss
        # Each cell is written once, so that the sums have the same bits on every device.
        grid = negative_log_p.new_zeros(num_targets * (1 + num_negatives) * self.depth)
        log_p = grid.index_copy(0, cell, -negative_log_p).view(-1, self.depth)
        exists = grid.index_copy(0, cell, torch.ones_like(negative_log_p)).view(-1, self.depth)
        return pair_scores(log_p.sum(1), exists.sum(1), num_targets, num_negatives, known)

    def forward(self, *inputs: Any, rewards: Tensor | None, loss_scale: float) -> PreferenceOutput:
        """The loss of a micro-batch, whose inputs are those of `scores`.

        It is the sum over targets times `loss_scale`.
        """
        scores = self.scores(*inputs)
        losses = self.loss(scores) if scores.negatives.shape[1] else -scores.target
        return PreferenceOutput(
            losses.sum() * loss_scale, _target_stats(losses, scores, inputs[1].numel())
        )


def _with(loss: type[PreferenceLoss]) -> Callable[..., Objective]:
    def objective(
        backbone: Backbone,
        config: ObjectiveConfig,
        preference: PreferenceConfig,
        catalogue: Catalogue,
        parallel: ParallelState,
    ) -> Objective:
        return PreferenceObjective(backbone, config, loss(preference), catalogue, parallel)

    return objective


# What the table of methods names.
dpo, softmax_dpo, simpo, smoothed_dpo = map(_with, (DPO, SoftmaxDPO, SimPO, SmoothedDPO))


def pair_scores(
    log_pi: Tensor, lengths: Tensor, num_targets: int, num_negatives: int, known: Tensor | None
) -> PairScores:
    """Sort log π [M] and lengths [M] of all
    continuations, and what is known, by target.
    """
    shape = num_targets, num_negatives
    reference_target, flip = log_pi.new_zeros(num_targets), log_pi.new_zeros(num_targets)
    reference_negatives = log_pi.new_zeros(shape)
    if known is not None:
        known = known.to(log_pi.dtype)
        reference_target, reference_negatives = known[:, 0], known[:, 1 : 1 + num_negatives]
        if known.shape[1] > 1 + num_negatives:
            flip = known[:, 1 + num_negatives]
    return PairScores(
        log_pi[:num_targets],
        log_pi[num_targets:].view(shape),
        lengths[:num_targets],
        lengths[num_targets:].view(shape),
        reference_target,
        reference_negatives,
        flip,
    )


def _target_stats(losses: Tensor, scores: PairScores, num_rows: int) -> TargetStats:
    margins, count = scores.margins.detach(), max(scores.negatives.shape[1], 1)
    return TargetStats(
        loss=losses.detach(),
        margin=margins.sum(1) / count,
        preferred=(margins > 0).to(margins.dtype).sum(1) / count,
        log_p_target=scores.target.detach(),
        log_p_negative=scores.negatives.detach().sum(1) / count,
        num_rows=num_rows,
    )
