"""The share of its GPUs' peak that a training reaches (model FLOPs utilisation)."""

from __future__ import annotations

# FLOP/s of one GPU in dense bf16 products, as its datasheet says, by a part of the name that CUDA
# has for it. The first part that occurs counts.
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_of(gpu: str) -> float | None:
    """FLOP/s of a whole GPU of this name in bf16; None where it is not known."""
    if "MIG" in gpu:
        return None
    return next((peak for part, peak in PEAKS.items() if part in gpu), None)


def mfu(operations: float, seconds: float, peak: float, gpus: int) -> float:
    """The share of the peak that the model's own operations reach.

    operations: those of all GPUs in that time, without what is
    computed again in backward (`flops.training_flops`).
    """
    return operations / (seconds * peak * gpus)
