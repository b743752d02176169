"""The three products with the head, accumulated in fp32 whatever the head's dtype.

`block` is how many head rows may be gathered or upcast at a time, so that nothing as
large as the head is ever copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilrec_kernels.layout.vocab_columns import VocabColumns

# Head rows that one product sums over on a CPU: a running fp32 sum over 10⁵ of them
# loses two digits.
CPU_SUM_ROWS = 4096
# The same on a GPU, for a head in fp32.
GPU_SUM_ROWS = 32_768


def _rounds_gradients(head: Tensor) -> bool:
    """Whether gradients at the logits are rounded to the head's dtype for the products.

    They are not rounded to fp16, in which most would be 0 after the loss's scale.
    """
    return head.is_cuda and head.dtype == torch.bfloat16


def project(x: Tensor, head: Tensor, columns: VocabColumns, out: Tensor, block: int) -> None:
    """Compute logits: out [r, c] = x [r, d] · head[columns]ᵀ."""
    in_one_product = not columns.is_scattered and (head.dtype == out.dtype or head.is_cuda)
    rows = max(1, len(columns)) if in_one_product else block
    for part, weight in columns.blocks(head, rows):
        if head.is_cuda and weight.dtype != out.dtype:
            torch.mm(x.to(weight.dtype), weight.T, out_dtype=out.dtype, out=out[:, part])
        else:
            torch.mm(x, weight.to(out.dtype).T, out=out[:, part])


def hidden_gradient(
    grad: Tensor,
    head: Tensor,
    columns: VocabColumns,
    out: Tensor,
    block: int,
    accumulate: bool = False,
) -> None:
    """Compute out [r, d] (+)= grad [r, c] · head[columns].

    On a GPU with a bf16 head, grad is in its dtype or rounded to it here.
    """
    if not accumulate:
        out.zero_()
    if not head.is_cuda:
        rows = min(block, CPU_SUM_ROWS)
    elif not columns.is_scattered and head.dtype == out.dtype:
        rows = GPU_SUM_ROWS
    elif not columns.is_scattered and _rounds_gradients(head):
        rows = max(1, len(columns))
    else:
        rows = block
    for part, weight in columns.blocks(head, rows):
        if not head.is_cuda:
            out += grad[:, part].to(out.dtype) @ weight.to(out.dtype)
        elif _rounds_gradients(head):
            torch.addmm(out, grad[:, part].to(weight.dtype), weight, out_dtype=out.dtype, out=out)
        else:
            out.addmm_(grad[:, part].to(out.dtype), weight.to(out.dtype))


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor, head_dtype: torch.dtype) -> None:
    """Compute out [c, d] (fp32 or fp64) += grad [r, c]ᵀ · x [r, d].

    On a GPU with a bf16 head the factors are in its dtype.
    """
    if out.is_cuda and head_dtype == torch.bfloat16:
        # This form needs no [c, d] besides out.
        torch.addmm(out, grad.to(head_dtype).T, x.to(head_dtype), out_dtype=out.dtype, out=out)
    else:
        out.addmm_(grad.to(out.dtype).T, x.to(out.dtype))
