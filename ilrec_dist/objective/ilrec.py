"""The training objective of a micro-batch: the backbone and the cross-layer loss.

The response rows of the backbone go through the loss operator (METHOD.md §§2-6).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from ilrec_kernels import Backend, LossOptions, LossOutput, TokenLists, cross_layer_loss
from torch import Tensor

from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.objective.config import (
    ObjectiveConfig,
    PreferenceConfig,
    num_intermediate_layers,
    num_streams,
)
from ilrec_dist.objective.metrics import LossStatistics
from ilrec_dist.objective.objective import Objective
from ilrec_dist.objective.rows import GroupedOutput, GroupedRowStats


def loss_options(config: ObjectiveConfig, vocab_size: int, item_tokens: np.ndarray) -> LossOptions:
    """The operator's options.

    vocab_size is the unpadded size; item_tokens int [I] are
    the distinct tokens of the items, ascending (METHOD.md §2).
    """
    # A contiguous range is passed as one, because it costs the operator less than a list.
    first, last = int(item_tokens[0]), int(item_tokens[-1])
    contiguous = last - first + 1 == len(item_tokens)
    workspace = (
        {} if config.workspace_mib is None else {"workspace_bytes": config.workspace_mib << 20}
    )
    return LossOptions(
        negative_threshold=config.negative_threshold,
        max_negatives=config.max_negatives,
        negative_scope=config.negative_scope,
        negatives_from=config.negatives_from,
        penalty=config.penalty,
        beta=config.beta,
        softmax_scope=config.softmax_scope,
        mu=config.cpd_mu,
        distill_scope=config.distill_scope,
        crr_lambda=config.crr_lambda,
        reward_floor=config.reward_floor,
        backend=Backend(config.backend),
        vocab_size=vocab_size,
        item_tokens=(first, last + 1)
        if contiguous
        else torch.from_numpy(item_tokens.astype(np.int64)),
        **workspace,
    )


class CrossLayerObjective(Objective):
    """The backbone and the cross-layer loss: SFT, ILRec and what lies between them."""

    def __init__(
        self,
        backbone: Backbone,
        config: ObjectiveConfig,
        num_layers: int,
        vocab_size: int,
        item_tokens: np.ndarray,
        parallel: ParallelState,
    ):
        super().__init__(backbone, config.softmax_scope, parallel)
        self.needs_rewards = config.crr_lambda > 0
        self.weights = config.term_weights
        self.terms = tuple(self.weights)
        self.num_layers = num_layers
        self.num_intermediate = num_intermediate_layers(config, num_layers)
        self.streams = num_streams(config, num_layers)
        self.options = self.full_options = loss_options(config, vocab_size, item_tokens)
        self.ramp = config.ramp
        # Words compete with the whole vocabulary, without negatives or distillation.
        self.words = dataclasses.replace(
            self.options, beta=0.0, mu=0.0, crr_lambda=0.0, softmax_scope="all"
        )

    def begin_step(self, step: int, total_steps: int) -> None:
        """Let β, μ and λ rise from 0 over the first
        share `ramp` of the steps (METHOD.md §11).
        """
        if self.ramp == 0:
            return
        share, full = min(1.0, step / (self.ramp * total_steps)), self.full_options
        self.options = dataclasses.replace(
            full,
            beta=share * full.beta,
            mu=share * full.mu,
            crr_lambda=share * full.crr_lambda,
        )
        self.weights |= {"cpd": self.options.mu, "crr": self.options.crr_lambda}

    @classmethod
    def build(
        cls,
        backbone: Backbone,
        config: ObjectiveConfig,
        catalogue: Catalogue,
        parallel: ParallelState,
    ) -> CrossLayerObjective:
        """The objective of a run's backbone and catalogue."""
        layers, tokens = backbone.config.num_layers, catalogue.used_tokens()
        return cls(backbone, config, layers, catalogue.vocab_size, tokens, parallel)

    def make_statistics(self, depth: int) -> LossStatistics:
        last = self.num_layers - 1
        layers = [last - i for i in range(self.num_intermediate)]
        return LossStatistics(depth, layers, self.weights, self.parallel.device)

    def forward(
        self,
        tokens: Tensor,
        rows: Tensor,
        targets: Tensor,
        indptr: Tensor,
        candidates: Tensor,
        groups: tuple[int, int, int, int] | None = None,
        *,
        rewards: Tensor | None,
        loss_scale: float,
    ) -> LossOutput | GroupedOutput:
        """The loss of a micro-batch: its sum over
        rows times `loss_scale`, and its parts.

        tokens int64 [B, S]; rows, targets int64 [N]; candidates, in CSR form, indptr
        int64 [N + 1] and candidates int64 [nnz]; rewards float32 [nnz], or None without
        CRR. With `groups` the first rows have rewards, the next are item tokens
        without, and the last, which have no candidates, are words: how many rows each,
        and last the candidates of the first ones, which `rewards` are of (METHOD.md
        §10).
        """
        hidden = self.backbone(tokens, rows, self.num_intermediate)
        lists = TokenLists(indptr, candidates)
        if groups is None:
            streams = (hidden.final, *hidden.layers)
            return self._loss(streams, targets, lists, rewards, self.options, loss_scale)
        *counts, num_rewards = groups
        unrewarded, words = None, hidden.final.new_zeros(0)
        if not self.needs_rewards:
            # The two kinds of items' rows are trained alike.
            counts, num_rewards = [counts[0] + counts[1], 0, counts[2]], candidates.numel()
        streams_of = [torch.split(stream, counts) for stream in (hidden.final, *hidden.layers)]
        targets_of = torch.split(targets, counts)
        with_rewards, without_rewards = _split_lists(lists, counts[0], num_rewards)
        # Every step has this call, so that the head always gets a gradient.
        streams = tuple(stream[0] for stream in streams_of)
        output = self._loss(streams, targets_of[0], with_rewards, rewards, self.options, loss_scale)
        loss, rewarded = output.loss, output.rows
        if counts[1]:
            streams = tuple(stream[1] for stream in streams_of)
            options = dataclasses.replace(self.options, crr_lambda=0.0)
            output = self._loss(streams, targets_of[1], without_rewards, None, options, loss_scale)
            loss, unrewarded = loss + output.loss, output.rows
        if counts[2]:
            output = self._loss(
                (streams_of[0][2],), targets_of[2], None, None, self.words, loss_scale
            )
            loss, words = loss + output.loss, output.rows.cpo
        return GroupedOutput(loss, GroupedRowStats(rewarded, unrewarded, words))

    def _loss(
        self,
        streams: tuple[Tensor, ...],
        targets: Tensor,
        candidates: TokenLists | None,
        rewards: Tensor | None,
        options: LossOptions,
        loss_scale: float,
    ) -> LossOutput:
        """One call of the operator; streams are n^L and n^l, [N, d] each."""
        output: LossOutput = cross_layer_loss(
            streams[0],
            streams[1:],
            self.backbone.head_weight,
            targets,
            candidates,
            rewards,
            options,
            vocab=self.backbone.vocab_range,
            loss_scale=loss_scale,
            trainable_rows=self.backbone.trainable_head_rows,
            trained_rows=self.backbone.trained_head_rows,
            tp_group=self.parallel.tp_group if self.parallel.tp > 1 else None,
        )
        return output


def _split_lists(lists: TokenLists, rows: int, tokens: int) -> tuple[TokenLists, TokenLists]:
    """The lists of the first `rows` rows, which
    have `tokens` tokens, and those of the others.
    """
    first = TokenLists(lists.indptr[: rows + 1], lists.tokens[:tokens])
    return first, TokenLists(lists.indptr[rows:] - tokens, lists.tokens[tokens:])


def cross_layer(
    backbone: Backbone,
    objective: ObjectiveConfig,
    _: PreferenceConfig,
    catalogue: Catalogue,
    parallel: ParallelState,
) -> Objective:
    """What the table of methods names for SFT and ILRec."""
    return CrossLayerObjective.build(backbone, objective, catalogue, parallel)
