#!/usr/bin/env bash
# triton 3.7.1 (with torch 2.13.0, numpy 2.4.6): the interpreter ignores the rounding mode of a cast to bfloat16.
#
# Behaviour: `x.to(tl.bfloat16)` is documented to round to the nearest even value, and `fp_downcast_rounding` to choose
# between "rtne" and "rtz". Under TRITON_INTERPRET=1 both modes, and the default, cut the lower 16 bits off.
# Output seen: 1.005859375 becomes 1.0 in all three cases, where torch gives 1.0078125; over 100,000 normal values the
# mean signed relative error is -0.0028 in place of about 0.
# Why it matters: the interpreter is how a kernel is tested without a GPU. Its manual says that arithmetic on bfloat16 is
# not supported and that one should compute in float32. A kernel that follows this, and only stores its result as
# bfloat16, is still compared with values that are biased towards zero: sums of gradients shrink by 0.3 %, and a
# tolerance wide enough to let that pass also hides real rounding faults.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat > "$folder/cast.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(source, plain, even, zero, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(source + i)
    tl.store(plain + i, x.to(tl.bfloat16))
    tl.store(even + i, x.to(tl.bfloat16, fp_downcast_rounding="rtne"))
    tl.store(zero + i, x.to(tl.bfloat16, fp_downcast_rounding="rtz"))


N = 131072
values = torch.randn(N, generator=torch.Generator().manual_seed(0))
values[0] = 1 + 2**-8 + 2**-9
outputs = [torch.zeros(N, dtype=torch.bfloat16) for _ in range(3)]
cast[(1,)](values, *outputs, N)
expected = values.bfloat16()
for name, output in zip(("default", "rtne", "rtz"), outputs):
    error = ((output.float() - values) / values).mean().item()
    print(f"{name}: {values[0].item()} -> {output[0].item()}, mean relative error {error:+.5f}")
print(f"torch: {values[0].item()} -> {expected[0].item()}, "
      f"mean relative error {((expected.float() - values) / values).mean().item():+.5f}")
assert all(torch.equal(outputs[0], output) for output in outputs), "the modes differ now"
assert outputs[1][0].item() == 1.0 and expected[0].item() == 1.0078125, "rtne rounds to even now"
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/cast.py"
