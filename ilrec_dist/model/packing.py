"""Takes the padding out of a batch of token sequences (METHOD.md §10, packing)."""

from __future__ import annotations

import torch
from torch import Tensor

from ilrec_dist.model.attention import PackedSequences

# A batch with less padding than this share of its tokens stays as it is.
LEAST_PADDING = 0.02


def pack(tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, PackedSequences] | None:
    """The tokens that the rows need, back to
    back: tokens [1, T], rows, and the boundaries.

    tokens int64 [B, S], padded on the right; rows int64 [N], flat indices into B ·
    S. What stands behind a sequence's last row is not seen by any row (attention
    is causal), so it counts as padding. None where there is little of it.
    """
    batch, width = tokens.shape
    lengths = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
    sequence, position = rows // width, rows % width
    lengths.scatter_reduce_(0, sequence, position, "amax")
    # The one wait for the device: how many tokens there are decides the shapes of all layers.
    sizes = (lengths + 1).cpu()
    if int(sizes.sum()) > (1 - LEAST_PADDING) * tokens.numel():
        return None
    lengths = sizes.to(tokens.device)
    starts = lengths.cumsum(0) - lengths
    kept = torch.arange(width, device=tokens.device) < lengths[:, None]
    packed = PackedSequences(sizes.tolist(), tokens.device)
    return tokens[kept][None], starts[sequence] + position, packed
