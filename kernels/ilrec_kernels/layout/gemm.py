"""The three products with the head, accumulated in fp32 whatever the head's dtype.

`block` is how many head rows may be gathered or upcast at a time, so that nothing as
large as the head is ever copied.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ilrec_kernels.layout.vocab_columns import VocabColumns

# Head rows that one product sums over on a CPU: a running fp32 sum over 10⁵ of them
# loses two digits.
CPU_SUM_ROWS = 4096
# The same on a GPU, for a head in fp32.
GPU_SUM_ROWS = 32_768


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 products of its own (AMX or AVX-512 BF16)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def rounds_gradients(head: Tensor, dtype: torch.dtype) -> bool:
    """Whether gradients at the logits are rounded to the head's dtype for the products.

    `dtype` is the computation's. They are not rounded to fp16,
    in which most would be 0 after the loss's scale, nor on a
    CPU without bf16 products, which would lose time by it.
    """
    to_bf16 = head.dtype == torch.bfloat16 and dtype == torch.float32
    return to_bf16 and (head.is_cuda or cpu_multiplies_bf16())


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

    Where gradients are rounded, grad is in the head's dtype or rounded to it here.
    A CPU then has each block's product in bf16; the blocks are summed in fp32.
    """
    if not accumulate:
        out.zero_()
    if not head.is_cuda:
        rows = min(block, CPU_SUM_ROWS)
    elif not columns.is_scattered and head.dtype == out.dtype:
        rows = GPU_SUM_ROWS
    elif not columns.is_scattered and rounds_gradients(head, out.dtype):
        rows = max(1, len(columns))
    else:
        rows = block
    for part, weight in columns.blocks(head, rows):
        if not head.is_cuda:
            dtype = weight.dtype if rounds_gradients(head, out.dtype) else out.dtype
            out += grad[:, part].to(dtype) @ weight.to(dtype)
        elif rounds_gradients(head, out.dtype):
            torch.addmm(out, grad[:, part].to(weight.dtype), weight, out_dtype=out.dtype, out=out)
        else:
            out.addmm_(grad[:, part].to(out.dtype), weight.to(out.dtype))


def weight_gradient(grad: Tensor, x: Tensor, head: Tensor, out: Tensor, block: int) -> None:
    """Compute out [c, d] (fp32 or fp64) += grad [r, c]ᵀ · x [r, d].

    Where gradients are rounded, so are the hidden rows: the factors are in the head's
    dtype. A CPU then has each block's product in bf16, before it is added.
    """
    if not rounds_gradients(head, out.dtype):
        out.addmm_(grad.to(out.dtype).T, x.to(out.dtype))
        return
    x = x.to(head.dtype)
    if out.is_cuda:
        # This form needs no [c, d] besides out.
        torch.addmm(out, grad.to(head.dtype).T, x, out_dtype=out.dtype, out=out)
        return
    rows = min(block, CPU_SUM_ROWS)
    for i in range(0, out.shape[0], rows):
        out[i : i + rows] += grad[:, i : i + rows].to(head.dtype).T @ x
