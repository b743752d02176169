"""The three products with the head, accumulated in fp32 whatever dtype the head is stored in.

`block` is how many head rows may be gathered or upcast at a time, so that nothing as large as the head is ever copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilrec_kernels.columns import Columns

SLAB = 4096  # head rows summed over at a time on CPU: a product over 10⁵ of them in one running sum loses two digits of fp32
GPU_SLAB = 32_768  # the same on a GPU, for a head in fp32


def _rounded(head: Tensor) -> bool:
    """Whether gradients at the logits are rounded to the head's dtype before the products: not to fp16, where after the loss's scale most would be 0."""
    return head.is_cuda and head.dtype == torch.bfloat16


def project(x: Tensor, head: Tensor, columns: Columns, out: Tensor, block: int) -> None:
    """out [r, c] = x [r, d] · head[columns]ᵀ."""
    at_once = columns.index is None and (head.dtype == out.dtype or head.is_cuda)
    for part, weight in columns.pieces(head, max(1, len(columns)) if at_once else block):
        if head.is_cuda and weight.dtype != out.dtype:
            torch.mm(x.to(weight.dtype), weight.T, out_dtype=out.dtype, out=out[:, part])
        else:
            torch.mm(x, weight.to(out.dtype).T, out=out[:, part])


def hidden_gradient(
    grad: Tensor, head: Tensor, columns: Columns, out: Tensor, block: int, accumulate: bool = False
) -> None:
    """out [r, d] (+)= grad [r, c] · head[columns]. On a GPU with a bf16 head, grad is in its dtype or rounded to it here."""
    if not accumulate:
        out.zero_()
    if not head.is_cuda:
        step = min(block, SLAB)
    elif columns.index is None and head.dtype == out.dtype:
        step = GPU_SLAB
    else:
        step = max(1, len(columns)) if columns.index is None and _rounded(head) else block
    for part, weight in columns.pieces(head, step):
        if not head.is_cuda:
            out += grad[:, part].to(out.dtype) @ weight.to(out.dtype)
        elif _rounded(head):
            torch.addmm(out, grad[:, part].to(weight.dtype), weight, out_dtype=out.dtype, out=out)
        else:
            out.addmm_(grad[:, part].to(out.dtype), weight.to(out.dtype))


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor, low: torch.dtype) -> None:
    """out [c, d] (fp32 or fp64) += grad [r, c]ᵀ · x [r, d]; on a GPU with a bf16 head (`low`) the factors are in its dtype."""
    if out.is_cuda and low == torch.bfloat16:
        torch.addmm(
            out, grad.to(low).T, x.to(low), out_dtype=out.dtype, out=out
        )  # no [c, d] besides out
    else:
        out.addmm_(grad.to(out.dtype).T, x.to(out.dtype))
