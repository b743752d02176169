#!/usr/bin/env bash
# triton 3.7.1 (with torch 2.13.0, numpy 2.4.6): the interpreter patches the language anew at every call of a device
# function, and does not put back what it changed there.
#
# Behaviour: a kernel may call other @triton.jit functions, of its own or of Triton's library (tl.sum, tl.max, tl.cdiv).
# Compiled, that costs nothing. Under TRITON_INTERPRET=1 a launch replaces the builtins of triton.language by interpreted
# ones and restores them at its end. Each call of a device function does the same search once more, through all members
# of the language, its tensor and math, and drops the record of what it replaced.
# Output seen: 1,000 calls of a function that adds one list members 4,000 times and take 3.5 times the CPU time of the
# same additions written out, which list nothing; after a launch that used tl.cdiv once has ended, 61 members of
# triton.language.core are not what they were before it.
# Why it matters: the interpreter is how a kernel is tested without a GPU. The search's cost goes with the number of calls
# and not with the data, so smaller shapes do not help: in one suite, of a kernel for top-k and a loss, it was half of
# the CPU time, and one search for each module in place of one a call gave the same results in half the time. And a
# test that looks at the language after another one's launch sees the interpreter's functions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat > "$folder/calls.py" <<'PY'
import inspect
import sys
import time

import torch
import triton
import triton.language as tl

CALLS = 1000


@triton.jit
def plus_one(x):
    return x + 1


@triton.jit
def by_function(out, N: tl.constexpr):
    x = tl.load(out)
    for _ in range(N):
        x = plus_one(x)
    tl.store(out, x)


@triton.jit
def written_out(out, N: tl.constexpr):
    x = tl.load(out)
    for _ in range(N):
        x = x + 1
    tl.store(out, x)


@triton.jit
def half(out):
    tl.store(out, tl.cdiv(tl.load(out), 2))


lists = 0
getmembers = inspect.getmembers


def counted(*arguments, **options):
    global lists
    lists += 1
    return getmembers(*arguments, **options)


inspect.getmembers = counted
found = {}
for kernel in (written_out, by_function):
    for calls in (1, CALLS):
        out, before = torch.zeros(1, dtype=torch.int32), lists
        started = time.process_time()
        kernel[(1,)](out, calls)
        found[kernel, calls] = lists - before, time.process_time() - started
        assert out.item() == calls
        print(f"{kernel.fn.__name__}, {calls} calls: {found[kernel, calls][0]} listings, "
              f"{found[kernel, calls][1]:.3f} s of CPU")
more = {k: found[k, CALLS][0] - found[k, 1][0] for k in (written_out, by_function)}
assert more[written_out] == 0
assert more[by_function] >= 3 * (CALLS - 1), "a device function's call no longer lists the members"
assert found[by_function, CALLS][1] > 1.5 * found[written_out, CALLS][1]

before = dict(vars(sys.modules["triton.language.core"]))
out = torch.full((1,), 7, dtype=torch.int32)
half[(1,)](out)
assert out.item() == 4
after = vars(sys.modules["triton.language.core"])
changed = [name for name, value in before.items() if after.get(name) is not value]
print(f"members of triton.language.core that a launch left changed: {len(changed)}")
assert len(changed) > 10, "what a launch changes is put back now"
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/calls.py"
