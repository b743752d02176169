"""Bytes of a training step's collectives over each process group.

A collective counts the whole tensor once: what is reduced or sent, or what every rank
holds after a gathering. `Collective.wire_bytes` is what a rank sends for it in a ring.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ilrec_dist.objective.config import ObjectiveConfig, num_intermediate_layers, num_streams
from ilrec_dist.plan.decoder import DecoderSizes, PlannedGroup
from ilrec_dist.plan.trained import ALL_WEIGHTS, TrainedParts, linears

GroupName = Literal["tp", "dp"]
Operation = Literal["all_reduce", "all_gather", "broadcast"]
FP32 = 4
# Whether a gradient is NaN or infinite.
FLAG_BYTES = 1
# The loss's ranks agree on the size of its chunks by two int64 numbers.
AGREED_BYTES = 16
# Statistics of a row that each rank sends: six of the final layer, three of every intermediate
# layer, and the number of its candidates, which have three values each (METHOD.md §7).
ROW_STATISTICS, LAYER_STATISTICS, CANDIDATE_VALUES = 7, 3, 3


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch of one data-parallel rank holds."""

    sequences: int
    # Of the longest sequence.
    tokens_per_sequence: int
    # Response rows of all sequences.
    rows: int
    # Candidates of all rows.
    entries: int
    # Tokens without padding, where sequences are packed back to back.
    packed_tokens: int | None = None

    @property
    def is_packed(self) -> bool:
        return self.packed_tokens is not None

    @property
    def tokens(self) -> int:
        """With padding, unless it is packed."""
        if self.packed_tokens is not None:
            return self.packed_tokens
        return self.sequences * self.tokens_per_sequence


@dataclass(frozen=True)
class Collective:
    group: GroupName
    what: str
    operation: Operation
    ranks: int
    # Of a whole optimizer step.
    bytes: int

    @property
    def wire_bytes(self) -> float:
        """What each rank sends in a ring."""
        share = (self.ranks - 1) / self.ranks
        return self.bytes * share * (2 if self.operation == "all_reduce" else 1)


@dataclass(frozen=True)
class StepLayout:
    """How a step is divided."""

    tp: int
    dp: int
    accumulation_steps: int
    # Bytes of a weight and of an activation.
    element: int
    zero_stage: int = 1
    # Some operations keep less for backward on a GPU.
    is_cuda: bool = True

    @property
    def keeps_gradients(self) -> bool:
        """Whether DeepSpeed keeps buffers of all gradients from step to step."""
        return self.element < FP32 and self.zero_stage == 1

    @property
    def overlaps_reduction(self) -> bool:
        """Whether gradients are summed while others are computed (training.engine)."""
        return self.is_cuda and self.dp > 1 and not self.keeps_gradients


def step_collectives(
    sizes: DecoderSizes,
    objective: ObjectiveConfig,
    batch: MicroBatch,
    layout: StepLayout,
    groups: Sequence[PlannedGroup],
    trained: TrainedParts = ALL_WEIGHTS,
    recompute: bool = False,
) -> list[Collective]:
    """The collectives of one optimizer step, whose micro-batches
    are `batch`; `groups` are the parameters that a rank trains.
    """
    collectives = []
    # One sum of squares a group; where every rank has all gradients, one of all.
    norms = FP32 * (1 if layout.keeps_gradients else len(groups))
    # In bf16 without all gradients the ranks agree on whether they are finite; elsewhere the norm
    # tells.
    has_flag = layout.element < FP32 and not layout.keeps_gradients
    if layout.tp > 1:
        in_layers = _of_layers(sizes, batch, layout, trained, recompute)
        in_loss = _of_loss(sizes, objective, batch, layout)
        for what, operation, size in itertools.chain(in_layers, in_loss):
            total = size * layout.accumulation_steps
            collectives.append(Collective("tp", what, operation, layout.tp, total))
        collectives.append(Collective("tp", "norm of the gradient", "all_reduce", layout.tp, norms))
    if layout.dp > 1:
        flat = sum(group.padded for group in groups)
        # ZeRO 2 sums the gradients of every micro-batch, ZeRO 1 those of the step.
        sums = layout.accumulation_steps if layout.zero_stage == 2 else 1
        collectives += [
            Collective("dp", "gradients", "all_reduce", layout.dp, sums * FP32 * flat),
            Collective("dp", "updated weights", "all_gather", layout.dp, layout.element * flat),
        ]
        if not layout.keeps_gradients:
            collectives.append(
                Collective("dp", "norm of the gradient", "all_reduce", layout.dp, norms)
            )
    if has_flag:
        ranks: dict[GroupName, int] = {"tp": layout.tp, "dp": layout.dp}
        collectives += [
            Collective(group, "whether it is finite", "all_reduce", count, FLAG_BYTES)
            for group, count in ranks.items()
            if count > 1
        ]
    return collectives


def _of_layers(
    sizes: DecoderSizes,
    batch: MicroBatch,
    layout: StepLayout,
    trained: TrainedParts,
    recompute: bool,
) -> Iterator[tuple[str, Operation, int]]:
    """(what, operation, bytes) over the tensor-parallel group, from the embeddings to
    the last layer.
    """
    residual = batch.tokens * sizes.hidden * layout.element
    yield "embeddings", "all_reduce", residual
    # Attention and feed-forward each end with one in forward, and begin with one in backward.
    yield "activations, forward", "all_reduce", 2 * sizes.layers * residual
    needs = [trained.needs(sizes, is_first=layer == 0) for layer in range(sizes.layers)]
    backward = sum(layer.inputs + layer.middle for layer in needs)
    yield "activations, backward", "all_reduce", backward * residual
    has = {linear.name: trained.adapters(linear) for linear in linears(sizes)}
    # Recomputation ends with the last tensor that the layer keeps for backward. Without adapters
    # or dropout there that is an input of the last product, before the sum over the ranks.
    ends_behind_sum = has["linear_fc2"] > 0 or sizes.config.dropout > 0
    if recompute:
        again = sizes.layers * (1 + ends_behind_sum) * residual
        yield "activations, recomputed", "all_reduce", again
    if sizes.config.qk_norm and trained.all_weights:
        size = 2 * sizes.layers * sizes.head_dim * layout.element
        yield "head norms, backward", "all_reduce", size
    if sizes.kv_heads < layout.tp:
        joint = batch.tokens * sizes.qkv_width * layout.element
        times = 2 if recompute else 1
        yield "shared key/value heads, forward", "all_gather", times * sizes.layers * joint
        backward = sum(layer.joint for layer in needs)
        yield "shared key/value heads, backward", "all_reduce", backward * joint
    if trained.lora is not None:
        adapter = sizes.layers * batch.tokens * trained.lora.rank * layout.element
        by_rows = (has["linear_proj"] + has["linear_fc2"]) * (2 if recompute else 1)
        yield "adapters, forward", "all_reduce", by_rows * adapter
        by_columns = has["linear_qkv"] + has["linear_fc1"]
        yield "adapters, backward", "all_reduce", by_columns * adapter


def _of_loss(
    sizes: DecoderSizes, objective: ObjectiveConfig, batch: MicroBatch, layout: StepLayout
) -> Iterator[tuple[str, Operation, int]]:
    """(what, operation, bytes) over the tensor-parallel group, of the loss."""
    yield from loss_exchange(sizes, objective, batch, layout.tp)
    if objective.crr_lambda > 0:
        yield "rewards", "broadcast", batch.entries * FP32


def loss_exchange(
    sizes: DecoderSizes, objective: ObjectiveConfig, batch: MicroBatch, tp: int
) -> Iterator[tuple[str, Operation, int]]:
    """(what, operation, bytes) of the loss of one micro-batch (METHOD.md §7)."""
    layers = num_intermediate_layers(objective, sizes.layers)
    needs_negatives = objective.beta > 0 or objective.crr_lambda > 0
    columns = ROW_STATISTICS + LAYER_STATISTICS * layers
    yield "loss, chunk sizes", "all_reduce", AGREED_BYTES
    if needs_negatives:
        columns += CANDIDATE_VALUES * (objective.max_negatives + 1)
        yield "loss, z̄ of the targets", "all_reduce", batch.rows * FP32
    yield "loss, statistics", "all_gather", batch.rows * columns * FP32 * tp
    streams = num_streams(objective, sizes.layers)
    yield "loss, hidden gradients", "all_reduce", streams * batch.rows * sizes.hidden * FP32
