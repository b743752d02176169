"""log p of candidate tokens from a vocabulary shard of the output head
(METHOD.md §7).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

SoftmaxScope = Literal["all", "valid_next"]

# Logits that are there at once on a CPU, where the
# candidates are few among them and where they are not.
BLOCK_ELEMENTS, ROW_ELEMENTS = 1 << 18, 1 << 23


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
        """The number of logits that a row needs at once where its candidates lie in
        `token_range`.
        """
        low, high = token_range
        return high - low

    def log_probabilities(
        self, hidden: Tensor, token: Tensor, exists: Tensor, token_range: tuple[int, int]
    ) -> Tensor:
        """fp32 [R, c] log p of the candidates; entries that do not exist hold anything.

        hidden [R, d]; token int64 [R, c] within `token_range`; exists bool [R, c].
        Under `valid_next` the existing candidates of a row are its whole scope.
        """
        hidden = hidden.float()
        chosen = torch.zeros(token.shape, device=hidden.device)
        row_max = hidden.new_full((len(hidden), 1), -torch.inf)
        sum_exp = hidden.new_zeros(len(hidden), 1)
        for low, high in self._blocks(len(hidden), token_range):
            logits = hidden @ self._rows(low, high).T
            if low < token_range[1] and high > token_range[0]:
                here = exists & (token >= low) & (token < high)
                column = torch.where(here, token - low, 0)
                chosen = torch.where(here, logits.gather(1, column), chosen)
            if self.scope == "all":
                highest = torch.maximum(row_max, logits.amax(1, keepdim=True))
                sum_exp *= torch.exp(row_max - highest)
                sum_exp += logits.sub_(highest).exp_().sum(1, keepdim=True)
                row_max = highest
        if self.group is not None:
            # The sum is exact: one rank holds the logit, the others add zeros.
            dist.all_reduce(chosen, group=self.group)
        if self.scope == "all":
            return chosen - self._log_sum_exp(row_max, sum_exp)
        return chosen - chosen.masked_fill(~exists, -torch.inf).logsumexp(1, keepdim=True)

    def _blocks(self, rows: int, token_range: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """The columns of this rank whose logits are made one after the other.

        Under `all` these are those of the true vocabulary, in blocks that stay in a
        CPU's cache where the candidates lie in few of them.
        """
        if self.scope == "all":
            first, last = self.start, min(self.stop, self.vocab_size)
        else:
            first, last = max(token_range[0], self.start), min(token_range[1], self.stop)
        elements = ROW_ELEMENTS
        if self.scope == "all" and 8 * (token_range[1] - token_range[0]) < last - first:
            elements = BLOCK_ELEMENTS
        step = max(1, elements // max(1, rows)) if self.weight.device.type == "cpu" else last
        for low in range(first, last, max(1, step)):
            yield low, min(low + step, last)

    def _log_sum_exp(self, row_max: Tensor, sum_exp: Tensor) -> Tensor:
        """fp32 [R, 1] over the columns of all ranks, from each rank's own."""
        if self.group is None:
            return row_max + sum_exp.log()
        highest = row_max.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        # Of a shard without a column the maximum is -inf.
        sum_exp = sum_exp * torch.exp(row_max - highest)
        dist.all_reduce(sum_exp, group=self.group)
        return highest + sum_exp.log()

    def _rows(self, low: int, high: int) -> Tensor:
        """fp32 [high - low, d], converted once for the slices of users of a step, and
        under `all` for all steps.
        """
        wanted = (self.start, self.stop) if self.scope == "all" else (low, high)
        if self._converted is None or self._converted[0] != wanted:
            first, last = wanted
            rows = self.weight[first - self.start : last - self.start].float()
            self._converted = (wanted, rows)
        (first, _), rows = self._converted
        return rows[low - first : high - first]
