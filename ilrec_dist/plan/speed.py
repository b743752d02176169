"""Time of an optimizer step from the speeds of matrix products and links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ilrec_dist.plan.communication import Collective, MicroBatch, StepLayout
from ilrec_dist.plan.decoder import DecoderSizes
from ilrec_dist.plan.hardware import Hardware

# AdamW reads weight, gradient and moments and writes weight and moments, all fp32.
UPDATE_BYTES = 28
# Forward, and backward to the activations and to the weights.
PRODUCTS = 3


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; nothing is taken to overlap."""

    products: float
    tensor_parallel: float
    data_parallel: float
    update: float
    # Operations that the model asks for on all GPUs, without recomputation.
    model_operations: float
    hardware: Hardware

    @property
    def total(self) -> float:
        return self.products + self.tensor_parallel + self.data_parallel + self.update

    @property
    def mfu(self) -> float:
        """The share of the GPUs' peak that the model's own operations reach."""
        return self.model_operations / (self.total * self.hardware.peak * self.hardware.gpus)


def forward_operations(sizes: DecoderSizes, batch: MicroBatch) -> float:
    """Operations of the layers in one forward
    pass; causal attention is counted as half.
    """
    weights = (sizes.qkv_width + sizes.query_width + sizes.fc1_width + sizes.ffn) * sizes.hidden
    attention = sizes.query_width * batch.tokens_per_sequence
    return 2.0 * sizes.layers * batch.tokens * (weights + attention)


def head_operations(sizes: DecoderSizes, batch: MicroBatch, streams: int) -> float:
    """Operations of one product of all streams' rows with the head."""
    return 2.0 * streams * batch.rows * sizes.hidden * sizes.vocab


def step_time(
    sizes: DecoderSizes,
    batch: MicroBatch,
    layout: StepLayout,
    hardware: Hardware,
    collectives: Sequence[Collective],
    trainable_per_rank: int,
    streams: int,
    recompute: bool = False,
) -> StepTime:
    """The time of a step in which every micro-batch is `batch`."""
    layers, head = forward_operations(sizes, batch), head_operations(sizes, batch, streams)
    asked = PRODUCTS * (layers + head) * layout.accumulation_steps * layout.dp
    done = asked + (layers * layout.accumulation_steps * layout.dp if recompute else 0.0)
    seconds = {"tp": 0.0, "dp": 0.0}
    for collective in collectives:
        seconds[collective.group] += collective.wire_bytes / link_speed(
            collective.group, layout, hardware
        )
    return StepTime(
        products=done / (hardware.gemm * layout.tp * layout.dp),
        tensor_parallel=seconds["tp"],
        data_parallel=seconds["dp"],
        update=UPDATE_BYTES * trainable_per_rank / layout.dp / hardware.memory_bandwidth,
        model_operations=asked,
        hardware=hardware,
    )


def link_speed(group: str, layout: StepLayout, hardware: Hardware) -> float:
    """The slowest link of a group's ring; ranks of a tp group are neighbours."""
    span = layout.tp if group == "tp" else layout.tp * layout.dp
    return hardware.node_link if span <= hardware.gpus_per_node else hardware.interconnect
