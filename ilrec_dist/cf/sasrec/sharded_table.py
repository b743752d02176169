"""SASRec's item table, whole or split over processes by item: lookup, full-softmax loss, and where an item stands among all (METHOD.md §5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ilrec_dist.common.errors import UserError

LOGITS_PER_CHUNK = {
    "cpu": 1 << 22,
    "cuda": 1 << 28,
}  # fp32 logits held at once by the loss: 16 MiB, near what a core's cache takes; 1 GiB on a GPU
ROWS_PER_CHUNK = 32  # at least: with fewer, each reads the table for too little
DRAWN_AT_ONCE = 1 << 22  # random numbers


@dataclass(frozen=True)
class Split:
    """Which items' rows of a table over `num_items` this process holds: [start, stop), one of `parts` ranges of about equal length.

    With several parts every process of the default torch.distributed group holds one, and all of them call the same things in the same order.
    """

    num_items: int
    part: int = 0
    parts: int = 1

    @classmethod
    def over_workers(cls, num_items: int) -> Split:
        """One part for each process of the default group. Raises UserError when there are more of them than items."""
        if dist.get_world_size() > num_items:
            raise UserError(
                f"cf.split_table: {dist.get_world_size()} workers for {num_items} items; choose fewer workers, or cf.split_table=false"
            )
        return cls(num_items, dist.get_rank(), dist.get_world_size())

    @property
    def start(self) -> int:
        return self.num_items * self.part // self.parts

    @property
    def stop(self) -> int:
        return self.num_items * (self.part + 1) // self.parts

    def own(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """For item indices int64: the row of this part (of some item of it, where the item is not), and whether the item is one of it."""
        inside = (items >= self.start) & (items < self.stop)
        return torch.where(inside, items - self.start, 0), inside

    def sum(self, values: Tensor) -> Tensor:
        """Summed over the parts, in place."""
        if self.parts > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The greatest over the parts, in place."""
        if self.parts > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def first(self, values: Tensor) -> Tensor:
        """Those of the first part, in place."""
        if self.parts > 1:
            dist.broadcast(values, 0)
        return values

    def told(self, value: Any) -> Any:
        """The first part's value, anything that can be pickled."""
        values = [value]
        if self.parts > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Returns when all parts have come here."""
        if self.parts > 1:
            dist.barrier()


class ItemTable(nn.Module):
    """Vectors of all items; `weight` holds the rows of this process's part, fp32 [stop − start, d]."""

    def __init__(self, split: Split, width: int, std: float) -> None:
        """Normal numbers, the same whatever the parts: every process draws all of them and keeps its own."""
        super().__init__()
        self.split = split
        self.weight = nn.Parameter(torch.empty(split.stop - split.start, width))
        own, total, first = (
            self.weight.detach().view(-1),
            split.num_items * width,
            split.start * width,
        )
        for begin in range(0, total, DRAWN_AT_ONCE):
            drawn = torch.empty(min(DRAWN_AT_ONCE, total - begin)).normal_(0, std)
            low, high = max(begin, first), min(begin + len(drawn), first + len(own))
            if low < high:
                own[low - first : high - first] = drawn[low - begin : high - begin]

    def forward(self, items: Tensor) -> Tensor:
        """Item indices int64 [...] → their vectors fp32 [..., d], of whatever part."""
        if self.split.parts == 1:
            return F.embedding(items, self.weight)
        rows, inside = self.split.own(items)
        return _Sum.apply(F.embedding(rows, self.weight) * inside[..., None], self.split)  # type: ignore[no-any-return]

    def logits(self, queries: Tensor) -> Tensor:
        """Of queries fp32 [R, d] with this part's items, fp32 [R, stop − start]."""
        return queries @ self.weight.t()

    def logits_of(self, items: Tensor, logits: Tensor) -> Tensor:
        """Each row's logit of its own item int64 [R], of whatever part, fp32 [R, 1]; `logits` as from `logits`."""
        rows, inside = self.split.own(items)
        return self.split.sum(logits.gather(1, rows[:, None]) * inside[:, None])

    def rank(self, items: Tensor, logits: Tensor) -> Tensor:
        """How many items of the whole table stand before each row's item int64 [R]; equal ones in item order. int64 [R]; `logits` as from `logits`."""
        own = self.logits_of(items, logits)
        before = (logits > own).sum(1)
        tied = logits == own
        tied &= (
            torch.arange(self.split.start, self.split.stop, device=logits.device) < items[:, None]
        )
        return self.split.sum(before + tied.sum(1))


class _Sum(torch.autograd.Function):
    """Sum over the parts. What follows is the same in all of them, so each one's gradient is the sum's own."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, split: Split) -> Tensor:
        return split.sum(values.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _FullSoftmaxLoss(torch.autograd.Function):
    """Sum of −log softmax(hidden · weightᵀ)[target]; gradients are made in forward, a chunk of rows at a time, so no [R, n] tensor is held."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, split: Split) -> Tensor:
        rows, largest = hidden.shape[0], -(-split.num_items // split.parts)
        chunk = max(
            ROWS_PER_CHUNK, LOGITS_PER_CHUNK[hidden.device.type] // largest
        )  # the same in all parts
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        buffer = hidden.new_empty(min(chunk, rows), len(weight))
        loss = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, rows, chunk):
            block = hidden[start : start + chunk]
            wanted, inside = split.own(targets[start : start + chunk])
            logits = torch.mm(block, weight.t(), out=buffer[: len(block)])
            top = split.max(logits.amax(1, keepdim=True))
            target_logit = logits.gather(1, wanted[:, None]) * inside[:, None]
            mass = logits.sub_(top).exp_().sum(1, keepdim=True)
            mass, target_logit = split.sum(torch.cat([mass, target_logit], 1)).split(1, 1)
            loss += (mass.log() + top - target_logit).sum(dtype=torch.float64)
            # softmax = logits / mass; the division is done on the narrow side of both products
            torch.mm(logits, weight, out=grad_hidden[start : start + chunk]).div_(mass).sub_(
                weight[wanted] * inside[:, None]
            )
            grad_weight.addmm_(logits.t(), block / mass).index_add_(
                0, wanted, block * inside[:, None], alpha=-1
            )
        ctx.save_for_backward(split.sum(grad_hidden), grad_weight)
        return loss.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grads[0],
            grad_weight.mul_(grads[0]),
            None,
            None,
        )  # in place: it is as large as the table, and autograd refuses a second time


def full_softmax_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, split: Split | None = None
) -> Tensor:
    """Summed cross-entropy of hidden fp32 [R, d] against the n rows of a table; targets int64 [R]. Once differentiable.

    weight fp32: the whole table [n, d], or with `split` this part's rows of it; the loss and the gradient of `hidden` are then those of the whole.
    """
    return _FullSoftmaxLoss.apply(hidden, weight, targets, split or Split(len(weight)))  # type: ignore[no-any-return]
