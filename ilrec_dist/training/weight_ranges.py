"""What a rank keeps of a weight that ZeRO 3 cuts over the data-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def cuts_weights(engine: Any) -> bool:
    """Whether the engine's weights are cut over the data-parallel ranks."""
    return bool(engine.zero_optimization_partition_weights())


def own_range(weight: Any) -> tuple[int, int]:
    """[start, stop) of a cut weight's elements that this rank keeps."""
    # Each rank's range is as long, and what is behind the weight's end is padding.
    size = weight.ds_tensor.ds_numel
    start = min(dist.get_rank(weight.ds_process_group) * size, weight.ds_numel)
    return start, min(start + size, weight.ds_numel)


def own_part(weight: nn.Parameter) -> Tensor:
    """The elements of a weight that this rank keeps; all, unless it is cut."""
    if not hasattr(weight, "ds_tensor"):
        return weight.detach()
    start, stop = own_range(weight)
    kept: Tensor = weight.ds_tensor
    return kept.detach()[: stop - start]


def shape_of(weight: Any) -> torch.Size:
    """Of the whole weight, also while it is cut."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape
