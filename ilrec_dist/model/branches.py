"""Several continuations of one sequence in one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor


class BranchedSequences:
    """Rows of B trunks with K branches each, as one batch of tokens [B, W + K · D].

    A row is a trunk of W tokens, padded on the right, and then its K branches of D
    tokens each. Branch k of row b continues the trunk behind its token anchors[b, k]:
    its tokens see the trunk up to there and the branch's own tokens before them, at the
    positions that they would have there. Trunk tokens see no branch. A branch therefore
    gives what the sequence of its trunk and itself would give alone, at the cost of its
    own D tokens.

    anchors: int64 [B, K], each below W; last_position: the largest anchor plus D, known
    on the host so that nothing waits for the device.
    """

    def __init__(self, trunk: int, anchors: Tensor, length: int, last_position: int) -> None:
        self.trunk, self.anchors, self.length = trunk, anchors, length
        # Positions that the embedding needs.
        self.num_positions = max(trunk, last_position + 1)
        rows, branches = anchors.shape
        device = anchors.device
        index = torch.arange(trunk, device=device)
        within = torch.arange(length, device=device)
        in_branches = (anchors[:, :, None] + 1 + within).flatten(1)
        self.positions = torch.cat([index.expand(rows, -1), in_branches], dim=1)  # [B, S]
        # Which trunk tokens each token sees, and which tokens of its own branch.
        last_seen = torch.cat(
            [index.expand(rows, -1), anchors.repeat_interleave(length, dim=1)], dim=1
        )
        sees_trunk = index <= last_seen[:, :, None]  # [B, S, W]
        of = torch.arange(branches, device=device).repeat_interleave(length)
        order = within.repeat(branches)
        branch = (of[:, None] == of) & (order <= order[:, None])  # [K · D, K · D]
        branch = torch.cat([branch.new_zeros(trunk, branches * length), branch])  # [S, K · D]
        self.mask = torch.cat([sees_trunk, branch.expand(rows, -1, -1)], dim=2)[:, None]

    @property
    def num_tokens(self) -> int:
        """S, tokens of each row."""
        return int(self.positions.shape[1])

    def to(self, device: torch.device) -> BranchedSequences:
        """The same branches on a device."""
        if self.anchors.device == device:
            return self
        last = self.num_positions - 1
        return BranchedSequences(self.trunk, self.anchors.to(device), self.length, last)
