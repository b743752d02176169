#!/usr/bin/env bash
# torch 2.13.0 on a CPU with bfloat16 instructions: on short sequences bfloat16 makes the backward pass of
# scaled_dot_product_attention three times as slow as float32, where the same attention written out gets faster.
#
# Behaviour: the backward pass of causal attention with 8 heads of 64 is timed on one thread: by the function as it is,
# by its own way without fusing (SDPBackend.MATH), and written out as two products and a softmax. The three give the
# same gradients. At 28 tokens only the first loses by bfloat16; at 400 tokens the two types cost it about the same.
# Output seen (AVX512-BF16, CPU time, medians of 15 passes over 1,792 tokens): at 28 tokens, from float32 to bfloat16, 10
# to 33 ms for the function, 7.6 to 7.5 ms for SDPBackend.MATH and 7.3 to 4.7 ms written out; at 400 tokens 41 to 45 ms,
# 39 to 39 ms and 41 to 18 ms.
# Why it matters: the histories of a sequential recommender, and of one that writes semantic ids, are some 20 to 100
# tokens long, and this function is what transformers takes for attention when nothing is said. Who turns bfloat16 on so
# that training on CPUs gets faster can get a slower step; attn_implementation="eager" or SDPBackend.MATH avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/attention.py" <<'PY'
import statistics
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, WIDTH, TOKENS = 8, 64, 1792
torch.set_num_threads(1)
if not torch.cpu._is_avx512_bf16_supported():
    sys.exit("this CPU has no AVX512-BF16, for which the figures are")


def fused(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def unfused(query, key, value):
    with sdpa_kernel(SDPBackend.MATH):
        return fused(query, key, value)


def written_out(query, key, value):
    length = query.shape[-2]
    later = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    return torch.softmax(query @ key.transpose(-1, -2) / WIDTH**0.5 + later, -1) @ value


def backward(attention, length, dtype):
    """Milliseconds of CPU time of one backward pass, and the gradient of the values."""
    torch.manual_seed(0)
    shape = (TOKENS // length, HEADS, length, WIDTH)
    of_output, *inputs = (torch.randn(shape).to(dtype) for _ in range(4))
    times = []
    for _ in range(15):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = attention(*leaves)
        began = time.process_time()
        output.backward(of_output)
        times.append(1000 * (time.process_time() - began))
    return statistics.median(times), leaves[2].grad.float()


took = {}
for length in (28, 400):
    for dtype in (torch.float32, torch.bfloat16):
        gradients = []
        for attention in (fused, unfused, written_out):
            took[attention, length, dtype], gradient = backward(attention, length, dtype)
            gradients.append(gradient)
        assert all(torch.allclose(gradients[0], other, atol=0.05, rtol=0.05) for other in gradients[1:])
        print(f"{length} tokens, {dtype}:", *(f"{a.__name__} {took[a, length, dtype]:.1f} ms" for a in (fused, unfused, written_out)))


def slower(attention, length):
    return took[attention, length, torch.bfloat16] / took[attention, length, torch.float32]


print(f"bfloat16 over float32 at 28 tokens: fused {slower(fused, 28):.1f}, written out {slower(written_out, 28):.1f}")
assert slower(fused, 28) > 1.7, "bfloat16 no longer makes the fused backward pass slower"
assert slower(written_out, 28) < 1, "bfloat16 makes the written-out pass slower as well now"
assert slower(unfused, 28) < 0.7 * slower(fused, 28) and slower(fused, 400) < 0.7 * slower(fused, 28)
PY
"$folder/venv/bin/python" "$folder/attention.py"
