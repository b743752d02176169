"""Bytes of a training step's collectives over each process group.

A collective counts the whole tensor once: what is reduced or sent, or what every rank
holds after a gathering. `Collective.wire_bytes` is what a rank sends for it in a ring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ilrec_dist.objective.config import ObjectiveConfig, num_intermediate_layers
from ilrec_dist.plan.decoder import DecoderSizes, FlatGroup

Operation = Literal["all_reduce", "all_gather", "broadcast"]
FP32 = 4
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

    @property
    def tokens(self) -> int:
        """With padding."""
        return self.sequences * self.tokens_per_sequence


@dataclass(frozen=True)
class Collective:
    group: Literal["tp", "dp"]
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


def step_collectives(
    sizes: DecoderSizes,
    objective: ObjectiveConfig,
    batch: MicroBatch,
    layout: StepLayout,
    groups: Sequence[FlatGroup],
) -> list[Collective]:
    """The collectives of one optimizer step;
    `groups` are the parameters that a rank trains.
    """
    found = []
    # One sum of squares a group; where every rank has all gradients, one of all.
    norms = FP32 * (1 if layout.keeps_gradients else len(groups))
    if layout.tp > 1:
        for what, operation, size in _of_micro_batch(sizes, objective, batch, layout):
            total = size * layout.accumulation_steps
            found.append(Collective("tp", what, operation, layout.tp, total))
        found.append(Collective("tp", "norm of the gradient", "all_reduce", layout.tp, norms))
    if layout.dp > 1:
        flat = sum(group.padded for group in groups)
        # ZeRO 2 sums the gradients of every micro-batch, ZeRO 1 those of the step.
        sums = layout.accumulation_steps if layout.zero_stage == 2 else 1
        found += [
            Collective("dp", "gradients", "all_reduce", layout.dp, sums * FP32 * flat),
            Collective("dp", "updated weights", "all_gather", layout.dp, layout.element * flat),
        ]
        if not layout.keeps_gradients:
            found.append(Collective("dp", "norm of the gradient", "all_reduce", layout.dp, norms))
    return found


def _of_micro_batch(
    sizes: DecoderSizes, objective: ObjectiveConfig, batch: MicroBatch, layout: StepLayout
) -> Iterator[tuple[str, Operation, int]]:
    """(what, operation, bytes) over the tensor-parallel group."""
    residual = batch.tokens * sizes.hidden * layout.element
    yield "embeddings", "all_reduce", residual
    # Attention and feed-forward each end with one in forward, and begin with one in backward.
    yield "activations, forward", "all_reduce", 2 * sizes.layers * residual
    yield "activations, backward", "all_reduce", 2 * sizes.layers * residual
    if sizes.config.qk_norm:
        size = 2 * sizes.layers * sizes.head_dim * layout.element
        yield "head norms, backward", "all_reduce", size
    if sizes.kv_heads < layout.tp:
        joint = sizes.layers * batch.tokens * sizes.qkv_width * layout.element
        yield "shared key/value heads, forward", "all_gather", joint
        yield "shared key/value heads, backward", "all_reduce", joint
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
    streams = 1 + (layers if streams_take_part(objective) else 0)
    yield "loss, hidden gradients", "all_reduce", streams * batch.rows * sizes.hidden * FP32


def streams_take_part(objective: ObjectiveConfig) -> bool:
    """Whether the loss makes logits of the intermediate layers."""
    needs_negatives = objective.beta > 0 or objective.crr_lambda > 0
    from_layers = needs_negatives and objective.negatives_from == "intermediate"
    return objective.cpd_mu > 0 or from_layers
