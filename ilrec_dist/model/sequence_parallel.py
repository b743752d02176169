"""Sequence parallelism: what lies between the tensor-parallel products is cut along
the tokens.

Norms, the residual stream, dropout and the biases behind row-parallel products then
work on this rank's tokens alone, and autograd keeps no more of them. A column-parallel
product gathers its input, and a row-parallel one scatters its sum over the ranks, which
together send what the all-reduce of the whole would.

The tokens [B, S] are taken end to end: each rank has ⌈B·S / tp⌉ of them, and the last
ones some rows of padding, which nothing reads. So packed, branched and padded batches
are cut alike, and only the attention sees sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class TokenCut:
    """How the tokens of a batch, [batch, length], are cut over the ranks of `group`.

    All methods but `owned` are collective over it, in their backward passes too.
    """

    def __init__(self, batch: int, length: int, group: dist.ProcessGroup) -> None:
        self.batch, self.length, self.group = batch, length, group
        self.tokens = batch * length
        self.per_rank = -(-self.tokens // group.size())
        self.padding = self.per_rank * group.size() - self.tokens

    def owned(self, whole: Tensor) -> Tensor:
        """This rank's part of the batch [B, S], with zeros as padding; [per_rank]."""
        padded = torch.cat([whole.flatten(), whole.new_zeros(self.padding)])
        return padded.chunk(self.group.size())[self.group.rank()]

    def column_product(self, shard: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product of all tokens with this rank's rows of a weight, [B, S, out].

        shard [per_rank, in]; weight [out, in] and bias [out]. Only the shard is kept
        for backward, which gathers it again where the weight is trained.
        """
        product: Tensor = _ColumnProduct.apply(  # type: ignore[no-untyped-call]
            shard, weight, bias, self
        )
        return product

    def gathered(self, shard: Tensor) -> Tensor:
        """All tokens' features [B, S, n], of which the ranks use different functions.

        shard [per_rank, n]; backward sums the ranks' gradients.
        """
        whole: Tensor = _Gathered.apply(shard, self)  # type: ignore[no-untyped-call]
        return whole

    def scattered_sum(self, partial: Tensor) -> Tensor:
        """This rank's tokens of the sum over the ranks of their `partial` [B, S, n].

        Returns [per_rank, n].
        """
        shard: Tensor = _ScatteredSum.apply(partial, self)  # type: ignore[no-untyped-call]
        return shard

    def rows(self, shard: Tensor, rows: Tensor) -> Tensor:
        """The features of some tokens, the same on every rank, [N, n].

        shard [per_rank, n]; rows int64 [N], flat indices into [B, S]. Every rank must
        come back with the whole gradient of them all, not with a part of its sum.
        """
        chosen: Tensor = _Rows.apply(shard, rows, self)  # type: ignore[no-untyped-call]
        return chosen

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that every rank holds whole and applies to its own tokens.

        Its gradient is summed over the ranks, and so is equal on them.
        """
        shared: Tensor = _Shared.apply(parameter, self.group)  # type: ignore[no-untyped-call]
        return shared


def _gather(shard: Tensor, cut: TokenCut) -> tuple[Tensor, Any]:
    """All tokens [tokens, n], once they were waited for."""
    whole = shard.new_empty(cut.per_rank * cut.group.size(), shard.shape[1])
    work = dist.all_gather_into_tensor(whole, shard.contiguous(), group=cut.group, async_op=True)
    return whole[: cut.tokens], work


def _scatter_sum(partial: Tensor, cut: TokenCut) -> tuple[Tensor, Any]:
    """This rank's part of the sum of [tokens, n], once it was waited for."""
    padded = partial.contiguous()
    if cut.padding:
        padded = torch.cat([padded, padded.new_zeros(cut.padding, padded.shape[1])])
    shard = padded.new_empty(cut.per_rank, padded.shape[1])
    return shard, dist.reduce_scatter_tensor(shard, padded, group=cut.group, async_op=True)


class _ColumnProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shard: Tensor, weight: Tensor, bias: Tensor | None, cut: TokenCut
    ) -> Tensor:
        ctx.cut = cut
        # A frozen weight needs no input in backward.
        ctx.save_for_backward(shard if ctx.needs_input_grad[1] else None, weight)
        whole, gathering = _gather(shard, cut)
        gathering.wait()
        product = torch.matmul(whole.view(cut.batch, cut.length, -1), weight.t())
        return product if bias is None else product.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shard, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grad.flatten(0, 1)
        of_shard = of_weight = None
        # The gathering goes on beside one product and the sum beside the other.
        if needs_weight:
            whole, gathering = _gather(shard, ctx.cut)
        if needs_input:
            of_shard, summing = _scatter_sum(grad @ weight, ctx.cut)
        if needs_weight:
            gathering.wait()
            of_weight = grad.t() @ whole
        of_bias = grad.sum(0) if needs_bias else None
        if needs_input:
            summing.wait()
        return of_shard, of_weight, of_bias, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, cut: TokenCut) -> Tensor:
        ctx.cut = cut
        whole, gathering = _gather(shard, cut)
        gathering.wait()
        return whole.view(cut.batch, cut.length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shard, summing = _scatter_sum(grad.flatten(0, 1), ctx.cut)
        summing.wait()
        return shard, None


class _ScatteredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, cut: TokenCut) -> Tensor:
        ctx.cut = cut
        shard, summing = _scatter_sum(partial.flatten(0, 1), cut)
        summing.wait()
        return shard

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole, gathering = _gather(grad, ctx.cut)
        gathering.wait()
        return whole.view(ctx.cut.batch, ctx.cut.length, -1), None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, rows: Tensor, cut: TokenCut) -> Tensor:
        is_other = (rows // cut.per_rank != cut.group.rank())[:, None]
        # Rows of other ranks are spread over the shard, where backward adds zeros.
        index = rows % cut.per_rank
        ctx.per_rank = cut.per_rank
        ctx.save_for_backward(is_other, index)
        chosen = shard.index_select(0, index).masked_fill_(is_other, 0)
        dist.all_reduce(chosen, group=cut.group)
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        is_other, index = ctx.saved_tensors
        of_shard = grad.new_zeros(ctx.per_rank, grad.shape[1])
        return of_shard.index_add_(0, index, grad.masked_fill(is_other, 0)), None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A copy, because the gradient may be another operation's as well.
        whole = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=ctx.group)
        return whole, None
