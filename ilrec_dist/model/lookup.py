"""Rows of a table by their numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """The rows of a table [n, d] that the int64 index names, [*index.shape, d].

    On a CPU torch sums the gradient of an embedding in the table's own type. In bf16 a
    row that a batch uses often then gets a part of its gradient only: 256 times what is
    added, the sum grows no more (torch 2.13). Here it is summed in fp32 and rounded
    once.
    """
    if table.is_cuda or table.dtype == torch.float32:
        return F.embedding(index, table)
    return table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])
