#!/usr/bin/env bash
# torch 2.13.0 on a CPU: the gradients of an embedding and of a layer norm's weight and bias in bfloat16 are summed in
# bfloat16, so a row that a batch uses often, and every norm, gets a fraction of its gradient.
#
# Behaviour: backward through nn.functional.embedding, embedding_bag with mode="sum", or table[ids] adds what belongs to
# one row of a bfloat16 table piece by piece and rounds to 8 bits after each. Once the sum is 256 times a piece, the piece
# is rounded away. index_select, and a product with one-hot rows, give the same values forward and the right gradient:
# the sum that float32 gives, rounded once.
# Output seen: a row used 10,000 times with gradients of 1 gets 256 in place of 9,984 (10,000 in bfloat16). With
# gradients drawn with mean 1 and deviation 1, the row's gradient is off by 2 % after 500 uses, 48 % after 2,000 and 94 %
# after 20,000, against 0.2 % with index_select. The bias of a layer norm over 2,000 rows is off by 48 % on one thread (each
# thread sums a part), over 20,000 by 94 %, its weight by 6 and 13 %; a weight and a bias in float32 beside an input in
# bfloat16 change nothing. RMSNorm, GroupNorm, BatchNorm1d and Linear are right, to 0.5 %. No warning is given.
# Why it matters: in a recommender's batch the words of the prompt's template, the padding and the most popular items
# stand thousands of times, and it is their rows that hardly learn, which looks like a property of the model. Weights in
# float32 in the optimizer do not help: what is missing is missing before it. Reading the table by
# table.index_select(0, ids) does, and a layer norm whose input and parameters are float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/gradient.py" <<'PY'
import torch
from torch.nn import functional

ROWS, WIDTH = 4, 64
READS = {
    "embedding": lambda table, ids: functional.embedding(ids, table),
    "bag": lambda table, ids: functional.embedding_bag(ids, table, torch.arange(len(ids)), mode="sum"),
    "table[ids]": lambda table, ids: table[ids],
    "index_select": lambda table, ids: table.index_select(0, ids),
    "one-hot": lambda table, ids: functional.one_hot(ids, ROWS).to(table.dtype) @ table,
}
PIECEWISE = ("embedding", "bag", "table[ids]")


def gradient(read, of_output, dtype=torch.bfloat16):
    table = torch.zeros(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    read(table, torch.zeros(len(of_output), dtype=torch.long)).backward(of_output.to(dtype))
    return table.grad[0].float()


ones = torch.ones(10_000, WIDTH)
sums = {name: gradient(read, ones)[0].item() for name, read in READS.items()}
print("10,000 gradients of 1:", sums)
for name, read in READS.items():
    assert gradient(read, ones, torch.float32)[0].item() == 10_000
    assert sums[name] == (256 if name in PIECEWISE else 9984), f"{name} sums otherwise now"
generator = torch.Generator().manual_seed(0)
for uses, at_least in ((500, 0.01), (2000, 0.3), (20_000, 0.8)):
    drawn = (torch.randn(uses, WIDTH, generator=generator) + 1).bfloat16()
    right = drawn.float().sum(0)
    error = {name: ((gradient(read, drawn) - right).norm() / right.norm()).item() for name, read in READS.items()}
    print(f"{uses:,} drawn gradients, relative error:", {name: round(value, 4) for name, value in error.items()})
    for name, value in error.items():
        assert value > at_least if name in PIECEWISE else value < 0.004, f"{name} is off by {value} now"

torch.set_num_threads(1)
NORMS = {
    "layer": torch.nn.LayerNorm(WIDTH),
    "rms": torch.nn.RMSNorm(WIDTH, eps=1e-5),
    "group": torch.nn.GroupNorm(8, WIDTH),
    "batch": torch.nn.BatchNorm1d(WIDTH),
    "linear": torch.nn.Linear(WIDTH, WIDTH),
}
for rows, of_bias, of_weight in ((2000, 0.2, 0.02), (20_000, 0.7, 0.07)):
    inputs = torch.randn(rows, WIDTH, generator=generator).bfloat16()
    outer = (torch.randn(rows, WIDTH, generator=generator) + 1).bfloat16()
    for name, module in NORMS.items():
        gradients = {}
        for dtype in (torch.float64, torch.bfloat16):
            module.to(dtype).zero_grad()
            module(inputs.to(dtype)).backward(outer.to(dtype))
            gradients[dtype] = {key: one.grad.double().clone() for key, one in module.named_parameters()}
        right = gradients[torch.float64]
        error = {key: ((one - right[key]).norm() / right[key].norm()).item() for key, one in gradients[torch.bfloat16].items()}
        print(f"{name}, {rows:,} rows, relative error:", {key: round(value, 4) for key, value in error.items()})
        if name == "layer":
            assert error["bias"] > of_bias and error["weight"] > of_weight, f"a layer norm is off by {error} now"
        else:
            assert max(error.values()) < 0.01, f"{name} is off by {error} now"
    # Parameters in float32 beside an input in bfloat16.
    norm = torch.nn.LayerNorm(WIDTH)
    norm(inputs).backward(outer)
    error = ((norm.bias.grad - outer.float().sum(0)).norm() / outer.float().sum(0).norm()).item()
    print(f"layer norm in float32 of an input in bfloat16, {rows:,} rows, bias: {error:.4f}")
    assert error > of_bias, f"the bias of a float32 layer norm is off by {error} now"
PY
"$folder/venv/bin/python" "$folder/gradient.py"
