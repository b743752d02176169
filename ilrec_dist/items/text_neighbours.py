"""The items whose texts are nearest to each item's."""

from __future__ import annotations

import numpy as np
import torch

# Inner products that are computed at once.
CHUNK_ELEMENTS = 1 << 24


def nearest_items(vectors: np.ndarray, count: int, device: torch.device) -> np.ndarray:
    """int32 [I, count] items by falling inner product with each item, without itself.

    vectors: float32 [I, d], of unit length for cosines. -1 stands where there
    are fewer. Every item is compared with every other one: I² · d products.
    """
    table = torch.from_numpy(np.ascontiguousarray(vectors)).to(device)
    width = min(count, len(table) - 1)
    nearest = np.full((len(table), count), -1, np.int32)
    step = max(1, CHUNK_ELEMENTS // max(len(table), 1))
    for first in range(0, len(table), step):
        scores = table[first : first + step] @ table.T
        row = torch.arange(len(scores), device=device)
        scores[row, first + row] = -torch.inf
        nearest[first : first + step, :width] = scores.topk(width, dim=1).indices.cpu().numpy()
    return nearest
