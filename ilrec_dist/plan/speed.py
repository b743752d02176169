"""Time of an optimizer step from the speeds of matrix products and links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ilrec_dist.model.flops import Trained, Work, forward_flops, training_flops
from ilrec_dist.model.utilisation import mfu
from ilrec_dist.plan.communication import Collective, MicroBatch, StepLayout
from ilrec_dist.plan.decoder import DecoderSizes
from ilrec_dist.plan.hardware import Hardware
from ilrec_dist.plan.trained import ALL_WEIGHTS, TrainedParts

# AdamW reads weight, gradient and moments and writes weight and moments, all fp32.
UPDATE_BYTES = 28


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
        return mfu(self.model_operations, self.total, self.hardware.peak, self.hardware.gpus)


def step_time(
    sizes: DecoderSizes,
    batch: MicroBatch,
    layout: StepLayout,
    hardware: Hardware,
    collectives: Sequence[Collective],
    trainable_per_rank: int,
    streams: int,
    trained: TrainedParts = ALL_WEIGHTS,
    recompute: bool = False,
) -> StepTime:
    """The time of a step in which every micro-batch is `batch`.

    A token attends to half of its sequence.
    """
    times = layout.accumulation_steps * layout.dp
    work = Work(times * batch.tokens, batch.tokens_per_sequence / 2, times * batch.rows)
    added = 0 if trained.rows is None else trained.rows[1] - trained.rows[0]
    done = asked = training_flops(
        sizes.config,
        work,
        [sizes.vocab] * streams,
        Trained(trained.all_weights, trained.lora, added),
    )
    if recompute:
        done += forward_flops(sizes.config, work, [], trained.lora)
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
