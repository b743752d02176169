"""Sums what preference losses log: the loss, how
often and by how much the target is preferred.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TargetStats:
    """What happened in each of T targets, [T] each, detached.

    margin, log_p_negative and preferred are means over a target's
    negatives: of Δ_y − Δ_n, of log π(n) and of whether Δ_y > Δ_n.
    """

    loss: Tensor
    margin: Tensor
    preferred: Tensor
    log_p_target: Tensor
    log_p_negative: Tensor
    # Response rows of all continuations.
    num_rows: int


class PreferenceStatistics:
    """fp64 sums over targets since the last report."""

    # How the means of TargetStats' fields are logged.
    NAMES = {
        "loss": "loss/total",
        "margin": "preference/margin",
        "preferred": "preference/accuracy",
        "log_p_target": "preference/log_p_target",
        "log_p_negative": "preference/log_p_negative",
    }

    def __init__(self, device: torch.device) -> None:
        # The last three are the numbers of targets, of rows and of input tokens.
        self._sums = torch.zeros(len(self.NAMES) + 3, dtype=torch.float64, device=device)

    def add(self, rows: TargetStats, num_tokens: int, grid_index: Tensor | None = None) -> None:
        sums = [getattr(rows, name).sum(dtype=torch.float64) for name in self.NAMES]
        counts = [
            sums[0].new_tensor(float(n)) for n in (rows.loss.numel(), rows.num_rows, num_tokens)
        ]
        self._sums += torch.stack([*sums, *counts])

    def is_finite(self, group: dist.ProcessGroup | None) -> bool:
        """Whether no sum is NaN or infinite on any rank; collective over the group."""
        finite = torch.isfinite(self._sums).all().to(torch.int32)
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=group)
        return bool(finite)

    def report(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        """The means over the targets of all ranks since the last report; starts anew.

        Collective over the group.
        """
        packed = self._sums.clone()
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(packed, group=group)
        self._sums.zero_()
        *sums, targets, rows, tokens = packed.tolist()
        means = (value / max(targets, 1.0) for value in sums)
        return {
            "tokens": tokens,
            "rows": rows,
            **dict(zip(self.NAMES.values(), means, strict=True)),
        }
