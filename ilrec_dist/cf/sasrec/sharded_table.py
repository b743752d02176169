"""SASRec's item table, whole or sharded over processes by item: lookup, loss and ranks.

METHOD.md §5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ilrec_dist.common.errors import UserError

# The fp32 logits that the loss holds in memory, by device: 16 MiB, near what a core's cache
# takes, or 1 GiB on a GPU.
LOGITS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 28}
# A chunk has at least so many rows: each chunk reads the whole table.
MIN_ROWS_PER_CHUNK = 32
# Random numbers drawn in one call.
DRAW_ELEMENTS = 1 << 22
# Added to the rank of a row with a score that is not finite: more than any catalogue's size.
NOT_FINITE = 1 << 40

T = TypeVar("T")


@dataclass(frozen=True)
class ItemShard:
    """The items whose table rows this process holds: [start, stop) of `num_items`.

    With `world_size` above 1 every process of the default torch.distributed group holds
    one shard, and all of them call the same methods in the same order.
    """

    num_items: int
    rank: int = 0
    world_size: int = 1

    @classmethod
    def of_process_group(cls, num_items: int) -> ItemShard:
        """One shard for each process of the default group.

        Raises UserError when there are more processes than items.
        """
        if dist.get_world_size() > num_items:
            raise UserError(
                f"cf.split_table: {dist.get_world_size()} workers for {num_items} items; "
                "choose fewer workers, or cf.split_table=false"
            )
        return cls(num_items, dist.get_rank(), dist.get_world_size())

    @property
    def start(self) -> int:
        return self.num_items * self.rank // self.world_size

    @property
    def stop(self) -> int:
        return self.num_items * (self.rank + 1) // self.world_size

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def local_rows(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Map global item indices int64 to rows of this shard.

        Returns (rows int64, mask bool); where another shard holds the item the mask is
        False and the row 0.
        """
        mask = (items >= self.start) & (items < self.stop)
        return torch.where(mask, items - self.start, 0), mask

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over the shards, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """The maximum over the shards, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def broadcast(self, values: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        if self.world_size > 1:
            dist.broadcast(values, 0)
        return values

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value, anything that can be pickled."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Return when all shards have come here."""
        if self.world_size > 1:
            dist.barrier()


class ItemTable(nn.Module):
    """Vectors of all items; `weight` fp32 [stop − start, d] holds this shard's rows."""

    def __init__(self, shard: ItemShard, width: int, std: float) -> None:
        """Draw normal numbers, the same for any number of shards.

        Every process draws the whole table and keeps its rows.
        """
        super().__init__()
        self.shard = shard
        self.weight = nn.Parameter(torch.empty(shard.stop - shard.start, width))
        local = self.weight.detach().view(-1)
        offset, total = shard.start * width, shard.num_items * width
        for begin in range(0, total, DRAW_ELEMENTS):
            drawn = torch.empty(min(DRAW_ELEMENTS, total - begin)).normal_(0, std)
            low, high = max(begin, offset), min(begin + len(drawn), offset + len(local))
            if low < high:
                local[low - offset : high - offset] = drawn[low - begin : high - begin]

    def forward(self, items: Tensor) -> Tensor:
        """Item indices int64 [...] → their vectors fp32 [..., d], from
        whichever shard.
        """
        if self.shard.world_size == 1:
            return F.embedding(items, self.weight)
        rows, mask = self.shard.local_rows(items)
        return _sum_over_shards(F.embedding(rows, self.weight) * mask[..., None], self.shard)

    def logits(self, queries: Tensor) -> Tensor:
        """Logits fp32 [R, stop − start] of this shard's items for queries
        fp32 [R, d].
        """
        return queries @ self.weight.t()

    def target_logits(self, targets: Tensor, logits: Tensor) -> Tensor:
        """Each row's logit of its target item int64 [R], of any shard: fp32 [R, 1].

        `logits` are those of `ItemTable.logits`.
        """
        rows, mask = self.shard.local_rows(targets)
        return self.shard.all_reduce_sum(logits.gather(1, rows[:, None]) * mask[:, None])

    def ranks(self, targets: Tensor, logits: Tensor) -> Tensor:
        """How many items of the whole table stand before each row's target: int64 [R].

        targets int64 [R]; `logits` are those of `ItemTable.logits`. Equal logits stand
        in item order. Raises FloatingPointError, in every process, where a row of the
        logits is not finite: no comparison with NaN holds, so that its target would
        stand first.
        """
        target_logits = self.target_logits(targets, logits)
        before = (logits > target_logits).sum(1)
        tied = logits == target_logits
        items = torch.arange(self.shard.start, self.shard.stop, device=logits.device)
        tied &= items < targets[:, None]
        ranks = before + tied.sum(1)
        ranks += torch.where(torch.isfinite(logits.sum(1)), 0, NOT_FINITE)
        ranks = self.shard.all_reduce_sum(ranks)
        if bool((ranks >= NOT_FINITE).any()):
            raise FloatingPointError("scores that are not finite have no ranks")
        return ranks


class _SumOverShards(torch.autograd.Function):
    """The sum over the shards.

    What follows is the same in all processes, so the gradient of each is the sum's
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: ItemShard) -> Tensor:
        return shard.all_reduce_sum(values.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _sum_over_shards(values: Tensor, shard: ItemShard) -> Tensor:
    return cast(Tensor, _SumOverShards.apply(values, shard))  # type: ignore[no-untyped-call]


class _FullSoftmaxLoss(torch.autograd.Function):
    """Sum of −log softmax(hidden · weightᵀ)[target].

    The gradients are computed in forward, a chunk of rows at a time, so that no tensor
    [R, n] is held in memory.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: ItemShard
    ) -> Tensor:
        num_rows, largest_shard = hidden.shape[0], -(-shard.num_items // shard.world_size)
        # The chunks are the same in all processes, for each chunk has collectives.
        chunk = max(MIN_ROWS_PER_CHUNK, LOGITS_PER_CHUNK[hidden.device.type] // largest_shard)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        buffer = hidden.new_empty(min(chunk, num_rows), len(weight))
        loss = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, num_rows, chunk):
            block = hidden[start : start + chunk]
            rows, mask = shard.local_rows(targets[start : start + chunk])
            logits = torch.mm(block, weight.t(), out=buffer[: len(block)])
            row_max = shard.all_reduce_max(logits.amax(1, keepdim=True))
            target_logit = logits.gather(1, rows[:, None]) * mask[:, None]
            sum_exp = logits.sub_(row_max).exp_().sum(1, keepdim=True)
            sums = shard.all_reduce_sum(torch.cat([sum_exp, target_logit], 1))
            sum_exp, target_logit = sums[:, :1], sums[:, 1:]
            loss += (sum_exp.log() + row_max - target_logit).sum(dtype=torch.float64)
            # softmax = logits / sum_exp; the division is done on the narrow side of both products.
            grad_block = torch.mm(logits, weight, out=grad_hidden[start : start + chunk])
            grad_block.div_(sum_exp).sub_(weight[rows] * mask[:, None])
            grad_weight.addmm_(logits.t(), block / sum_exp)
            grad_weight.index_add_(0, rows, block * mask[:, None], alpha=-1)
        ctx.save_for_backward(shard.all_reduce_sum(grad_hidden), grad_weight)
        return loss.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # The weight's gradient is scaled in place, for it is as large as the table; autograd
        # refuses a second backward.
        return grad_hidden * grads[0], grad_weight.mul_(grads[0]), None, None


def full_softmax_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: ItemShard | None = None
) -> Tensor:
    """Summed cross-entropy of hidden fp32 [R, d] against the n rows of an item table.

    targets int64 [R]; weight fp32: the whole table [n, d], or with `shard` the rows of
    that shard, where the loss and the gradient of `hidden` are those of the whole
    table. Once differentiable.
    """
    loss = _FullSoftmaxLoss.apply(hidden, weight, targets, shard or ItemShard(len(weight)))  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)
