"""The three products with the head, accumulated in fp32 whatever dtype the head is stored in."""

from __future__ import annotations

import torch
from torch import Tensor

SLAB = 4096  # head rows summed over at a time on CPU: a product over 10⁵ of them in one running sum loses two digits of fp32


def project(x: Tensor, weight: Tensor, out: Tensor, block: int) -> None:
    """out [r, c] = x [r, d] · weight [c, d]ᵀ. `block` is how many head rows may be upcast at a time on CPU."""
    if weight.dtype == out.dtype:
        torch.mm(x, weight.T, out=out)
    elif weight.is_cuda:
        torch.mm(x.to(weight.dtype), weight.T, out_dtype=out.dtype, out=out)
    else:
        for i in range(0, weight.shape[0], block):
            out[:, i : i + block] = x @ weight[i : i + block].to(out.dtype).T


def hidden_gradient(grad: Tensor, weight: Tensor, out: Tensor, block: int, accumulate: bool = False) -> None:
    """out [r, d] (+)= grad [r, c] · weight [c, d]. On a GPU with a half-precision head, grad is rounded once, here."""
    if not accumulate:
        out.zero_()
    if not weight.is_cuda:
        step = max(1, min(block, SLAB))
        for i in range(0, weight.shape[0], step):
            out += grad[:, i : i + step].to(out.dtype) @ weight[i : i + step].to(out.dtype)
    elif weight.dtype == out.dtype:
        out.addmm_(grad, weight)
    else:
        torch.addmm(out, grad.to(weight.dtype), weight, out_dtype=out.dtype, out=out)


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor, low: torch.dtype) -> None:
    """out [c, d] (fp32 or fp64) += grad [r, c]ᵀ · x [r, d]; on a GPU with a half-precision head (`low`) the factors are in its dtype."""
    if out.is_cuda and low != out.dtype:
        torch.addmm(out, grad.to(low).T, x.to(low), out_dtype=out.dtype, out=out)  # no [c, d] besides out
    else:
        out.addmm_(grad.to(out.dtype).T, x)
