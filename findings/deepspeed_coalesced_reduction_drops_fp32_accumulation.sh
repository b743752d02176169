#!/usr/bin/env bash
# DeepSpeed 0.19.8 with torch 2.13.0: inside engine.coalesce_grad_reduction() gradients are accumulated in bfloat16, also
# where the configuration asks for float32 (data_types.grad_accum_dtype), and the later micro-batches of a step vanish.
#
# Behaviour: with bf16 and "data_types": {"grad_accum_dtype": "fp32"} ZeRO 2 and 3 reduce each micro-batch's gradients and
# add them to a float32 partition. coalesce_grad_reduction() leaves them in param.grad until the block ends, where torch
# adds them in the dtype of the weights, and only then are they reduced and copied to float32. Under ZeRO 1 the call refuses
# this configuration with NotImplementedError; ZeRO 2 and 3 take it, with no warning. Its docstring lists
# constraints, and none on precision.
# Output seen: two processes, one step of plain descent, each micro-batch with a gradient of 1: as usual 1,024 of them
# move the weight by 1,024, inside the block by 256, what 256 would have (256 + 1 is 256 in bfloat16). With gradients
# drawn with mean 1 and deviation 1 the sum is off by 0.6 % after 64 micro-batches and 19 % after 1,024, against 0.03 and
# 0.01 % as usual, to the digit as if "bf16" had been asked for. The same under ZeRO 2 and 3.
# Why it matters: the block is meant for many micro-batches in a step, where it saves the most communication, and float32
# accumulation is asked for because of them. Around an unchanged loop it is read as a matter of speed, yet biases, norms
# and frequent embeddings, whose gradients agree over the batch, learn from its first part alone. A test of few
# micro-batches shows nothing. Accumulate without the block where this precision counts, or keep the steps short.
# Needs a C++ compiler, with which DeepSpeed builds its communication for CPUs. Takes some minutes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 setuptools wheel ninja==1.13.2
"$folder/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cat > "$folder/coalesced.py" <<'PY'
import contextlib
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

WIDTH, RANKS = 1024, 2


def rows(rank, micro_batches):
    """A micro-batch's row: 1 in its first half, in the second drawn with mean 1 and deviation 1."""
    drawn = torch.randn(micro_batches, WIDTH, generator=torch.Generator().manual_seed(rank)) + 1
    drawn[:, : WIDTH // 2] = 1
    return drawn.bfloat16()


def gradient(stage, coalesced, accumulate, rank, micro_batches):
    """What one step of plain descent takes from the float32 weights: the row's sum, mean of the ranks."""
    model = torch.nn.Linear(WIDTH, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": accumulate},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    with engine.coalesce_grad_reduction() if coalesced else contextlib.nullcontext():
        for number, row in enumerate(rows(rank, micro_batches), start=1):
            engine.set_gradient_accumulation_boundary(number == micro_batches)
            engine.backward(engine(row[None]).float().sum())
    engine.step()
    taken = -safe_get_full_fp32_param(model.weight)[0]
    engine.destroy()
    return taken


def run(rank, store):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    for micro_batches in (64, 1024):
        right = sum(rows(other, micro_batches).float().sum(0) for other in range(RANKS)) / RANKS
        right_drawn = right[WIDTH // 2 :]
        for stage in (2, 3):
            for coalesced, accumulate in ((False, "fp32"), (True, "fp32"), (True, "bf16")):
                same, drawn = gradient(stage, coalesced, accumulate, rank, micro_batches).chunk(2)
                error = ((drawn - right_drawn).norm() / right_drawn.norm()).item()
                if rank == 0:
                    manner = "coalesced" if coalesced else "as usual"
                    print(
                        f"ZeRO {stage}, {micro_batches:,} micro-batches, {accumulate} asked, {manner}: "
                        f"{same[0].item():.0f} of {micro_batches:,}; drawn, off by {error:.2%}",
                        flush=True,
                    )
                assert (same == (min(micro_batches, 256) if coalesced else micro_batches)).all(), "this has changed"
                assert error > 0.003 if coalesced else error < 0.001, "this has changed"


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, (Path(sys.argv[1]).as_uri(),), nprocs=RANKS)
PY
DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$folder/built" PATH="$folder/venv/bin:$PATH" \
    "$folder/venv/bin/python" "$folder/coalesced.py" "$folder/store" 2>"$folder/log" | grep "^ZeRO" \
    || { tail -n 5 "$folder/log"; exit 1; }
