"""The decoder's elementwise operations, with less kept for backward than torch's own
derivatives would keep.

Results and gradients are those of the plain expressions, bit for bit: they are made of
the same roundings in the same order. Only a layer norm's parameters get other gradients
in bf16, because torch's own are wrong there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ilrec_dist.model.sequence_parallel import TokenCut

# Cosines and sines of the positions' angles, [1 or B, S or 1, 1, head_dim] each.
Rotary = tuple[Tensor, Tensor]


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) · up of the two halves of the last dimension, all that is kept."""
    product: Tensor = _SwiGLU.apply(gate_and_up)  # type: ignore[no-untyped-call]
    return remakable(product, _gated, gate_and_up)


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """RoPE on [B, S, heads, head_dim], of which nothing is kept."""
    rotated: Tensor = _Rotation.apply(heads, *rotary)  # type: ignore[no-untyped-call]
    return rotated


def normed(norm: nn.Module, hidden: Tensor, cut: TokenCut | None = None) -> tuple[Tensor, Tensor]:
    """The norm of the residual stream [..., d], and the stream itself, to go on with.

    With a cut the stream is this rank's tokens of it. torch's RMS norm on a CPU keeps
    the normalised rows besides the stream, and a copy in fp32 of a stream in bf16. This
    one makes them again, and adds up the stream's gradients in the same order. torch's
    layer norm in bf16 on a CPU sums the gradients of weight and bias in bf16, where
    they stop growing (torch 2.13); here they are summed in fp32 and rounded once.
    """
    weights: dict[str, Tensor] = {}
    if cut is not None:
        weights = {name: cut.shared(weight) for name, weight in norm.named_parameters()}
    if isinstance(norm, nn.RMSNorm) and not hidden.is_cuda:
        rows, stream = _RMSNorm.apply(  # type: ignore[no-untyped-call]
            hidden, weights.get("weight", norm.weight), norm.eps
        )
    elif isinstance(norm, nn.LayerNorm) and hidden.dtype != torch.float32 and not hidden.is_cuda:
        parameters = dict(norm.named_parameters()) | weights
        weight, bias = parameters["weight"], parameters["bias"]
        rows = _LayerNorm.apply(hidden, weight, bias, norm.eps)  # type: ignore[no-untyped-call]
        stream = hidden
    elif cut is not None:
        rows, stream = torch.func.functional_call(norm, weights, (hidden,)), hidden
    else:
        rows, stream = norm(hidden), hidden
    return remakable(rows, norm, stream), stream


def remakable(result: Tensor, function: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
    """Mark the result as `function(source)`, elementwise or nearly so, of a source that
    is kept for backward anyway.

    Who needs the result there may keep the source, and make it again.
    """
    result.remake = (function, source)  # type: ignore[attr-defined]
    return result


def remake_of(result: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
    """The function and the source; None where
    nothing is marked or the source is not kept.
    """
    remake: tuple[Callable[[Tensor], Tensor], Tensor] | None = getattr(result, "remake", None)
    return remake if remake is not None and remake[1].requires_grad else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        scale = hidden.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, scale, weight)
        ctx.set_materialize_grads(False)
        rows = (hidden * scale).mul_(weight).to(hidden.dtype)
        return rows, hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, of_stream: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return of_stream, None, None
        hidden, scale, weight = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (hidden * scale).mul_(grad).sum(tuple(range(grad.dim() - 1)))
            of_weight = of_weight.to(weight.dtype)
        grad = grad.float() * weight
        of_square = (grad * hidden).sum(-1, keepdim=True).mul_(-0.5).mul_(scale.pow(3))
        of_hidden = grad.mul_(scale)
        if of_stream is not None and hidden.dtype == torch.float32:
            of_hidden = of_hidden.add_(of_stream)
        of_square.div_(hidden.shape[-1])
        of_hidden = of_hidden.add_((2 * hidden.float()).mul_(of_square))
        if hidden.dtype != torch.float32:
            of_hidden = of_hidden.to(hidden.dtype)
            if of_stream is not None:
                of_hidden = of_hidden.add_(of_stream)
        return of_hidden, of_weight, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows, mean, scale = torch.native_layer_norm(hidden, weight.shape, weight, bias, eps)
        ctx.save_for_backward(hidden, mean, scale, weight, bias)
        return rows

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, mean, scale, weight, bias = ctx.saved_tensors
        of_hidden, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, hidden, weight.shape, mean, scale, weight, bias, [True, False, False]
        )
        of_weight = of_bias = None
        rows = tuple(range(grad.dim() - 1))
        if ctx.needs_input_grad[1]:
            of_weight = hidden.float().sub_(mean).mul_(scale).mul_(grad).sum(rows)
            of_weight = of_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(rows)
        return of_hidden, of_weight, of_bias, None


def _gated(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        return _gated(gate_and_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        joint = torch.empty_like(gate_and_up)
        of_gate, of_up = joint.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return joint


class _Rotation(torch.autograd.Function):
    """(x₁, x₂) of each head → (x₁ cos − x₂ sin, x₂ cos + x₁ sin)."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = heads.chunk(2, dim=-1)
        sin_first, sin_second = sin.chunk(2, dim=-1)
        rotated = heads * cos
        rotated_first, rotated_second = rotated.chunk(2, dim=-1)
        rotated_first.sub_(second * sin_first)
        rotated_second.add_(first * sin_second)
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = grad.chunk(2, dim=-1)
        sin_first, sin_second = sin.chunk(2, dim=-1)
        of_heads = grad * cos
        of_first, of_second = of_heads.chunk(2, dim=-1)
        of_first.add_(second * sin_second)
        of_second.sub_(first * sin_first)
        return of_heads, None, None
