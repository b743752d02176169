"""log p of candidate tokens from a vocabulary shard of the output head
(METHOD.md §7).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

SoftmaxScope = Literal["all", "valid_next"]


class ParallelHead:
    """log p of candidate tokens; logits are fp32 and exist on one slice of rows at a
    time.

    `weight` [V_local, d] holds the rows [start, stop) of the padded
    vocabulary. With `group` every rank calls `log_probabilities`
    with the same arguments and gets the same values.
    """

    def __init__(
        self,
        weight: Tensor,
        vocab_range: tuple[int, int],
        vocab_size: int,
        scope: SoftmaxScope,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.weight, (self.start, self.stop) = weight.detach(), vocab_range
        # The rows that were used last, in fp32.
        self._converted: tuple[tuple[int, int], Tensor] | None = None
        self.vocab_size, self.scope = vocab_size, scope
        self.group = group if group is not None and group.size() > 1 else None

    def num_columns(self, token_range: tuple[int, int]) -> int:
        """The number of logits that a row needs where its candidates lie in
        `token_range`.
        """
        low, high = self._columns(token_range)
        return high - low

    def log_probabilities(
        self, hidden: Tensor, token: Tensor, exists: Tensor, token_range: tuple[int, int]
    ) -> Tensor:
        """fp32 [R, c] log p of the candidates; entries that do not exist hold anything.

        hidden [R, d]; token int64 [R, c] within `token_range`; exists bool [R, c].
        Under `valid_next` the existing candidates of a row are its whole scope.
        """
        low, high = self._columns(token_range)
        low, high = max(low, self.start), min(high, self.stop)
        if self.group is None:
            logits = hidden.float() @ self._rows(low, high).T
            chosen = logits.gather(1, torch.where(exists, token - low, 0))
            if self.scope == "all":
                return chosen - self._log_sum_exp(logits)
        else:
            # A shard may hold none of the columns.
            high = max(low, high)
            logits = hidden.float() @ self._rows(low, high).T
            local = exists & (token >= low) & (token < high)
            chosen = torch.zeros(token.shape, device=hidden.device)
            if high > low:
                column = torch.where(local, token - low, 0)
                chosen = torch.where(local, logits.gather(1, column), chosen)
            # The sum is exact: one rank holds the logit, the others add zeros.
            dist.all_reduce(chosen, group=self.group)
            if self.scope == "all":
                return chosen - self._log_sum_exp(logits)
        return chosen - chosen.masked_fill(~exists, -torch.inf).logsumexp(1, keepdim=True)

    def _rows(self, low: int, high: int) -> Tensor:
        """fp32 [high - low, d], converted once for the slices of users of a step, and
        under `all` for all steps.
        """
        if self._converted is None or self._converted[0] != (low, high):
            rows = self.weight[low - self.start : high - self.start].float()
            self._converted = ((low, high), rows)
        return self._converted[1]

    def _columns(self, token_range: tuple[int, int]) -> tuple[int, int]:
        """The vocabulary range of a step's logits: all of it, or where its candidates
        lie.
        """
        return (0, self.vocab_size) if self.scope == "all" else token_range

    def _log_sum_exp(self, logits: Tensor) -> Tensor:
        """fp32 [R, 1] over the columns of all ranks; overwrites the logits."""
        row_max = (
            logits.amax(1, keepdim=True)
            if logits.shape[1]
            else logits.new_full((len(logits), 1), -torch.inf)
        )
        if self.group is not None:
            dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=self.group)
        sum_exp = logits.sub_(row_max).exp_().sum(1, keepdim=True)
        if self.group is not None:
            dist.all_reduce(sum_exp, group=self.group)
        return row_max + sum_exp.log()
