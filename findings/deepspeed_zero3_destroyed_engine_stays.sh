#!/usr/bin/env bash
# DeepSpeed 0.19.8 with torch 2.13.0: a ZeRO 3 engine that was destroyed and deleted stays in memory as long as the
# process lives, with its weights, their float32 copies and the optimizer's moments.
#
# Behaviour: three models are trained for three steps each, one after the other, in one process. After each,
# engine.destroy() is called, every reference is dropped and the garbage collector runs. With ZeRO 2 nothing is left.
# With ZeRO 3 two caches of the library's own keep what hangs on each engine: a list of modules, to which every engine
# adds its model at its start and from which none takes it, and the memory of a cached method, whose keys are the object
# that it belongs to and the modules.
# Output seen: 0, 0 and 0 MiB of live tensors after the three engines with ZeRO 2; 16, 32 and 48 MiB with ZeRO 3, for a
# model of 4 MiB in float32: a copy in float32, two moments, and weights and gradients in bfloat16. Emptying either of
# the two caches frees nothing, emptying both frees all.
# Why it matters: sweeps, cross-validation and training in stages (pretrain, fine-tune, align) build an engine after
# another in one process. ZeRO 3 is chosen where a model just fits, so it is the second one that runs out of memory, far
# from the cause, and neither destroy() nor gc.collect() helps. The ways out are a process for each model, or emptying
# the caches by their private names, as below.
# Needs a C++ compiler, with which DeepSpeed builds its communication for CPUs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 setuptools wheel ninja==1.13.2
"$folder/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cat > "$folder/engines.py" <<'PY'
import gc
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

MIB = 2**20


def live():
    """MiB of all tensors that the process still has."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values()) / MIB


def train(stage):
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(4)])
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
        },
    )
    for _ in range(3):
        engine.backward(engine(torch.randn(2, 512).bfloat16()).float().square().mean())
        engine.step()
    engine.destroy()


def modules():
    parameter_offload.FWD_MODULE_STACK.clear()


def method():
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    for cell in coordinator._PartitionedParameterCoordinator__params_to_release.__closure__:
        cell.cell_contents.cache_clear()


def left(stage):
    train(stage)
    return round(live() - before)


torch.distributed.init_process_group("gloo", init_method=Path(sys.argv[1]).as_uri(), rank=0, world_size=1)
before = live()
for stage, expected in ((2, [0, 0, 0]), (3, [16, 32, 48])):
    after = [left(stage) for _ in range(3)]
    print(f"ZeRO {stage}: MiB of tensors after each engine {after}", flush=True)
    assert after == expected, "this has changed"
for first, second in ((modules, method), (method, modules)):
    train(3)
    first()
    kept = round(live() - before)
    second()
    freed = round(live() - before)
    print(f"ZeRO 3: {kept} MiB after emptying that of the {first.__name__}, {freed} MiB after emptying both", flush=True)
    assert kept > 0 and freed == 0, "this has changed"
PY
DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$folder/built" RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 PATH="$folder/venv/bin:$PATH" \
    "$folder/venv/bin/python" "$folder/engines.py" "$folder/store" 2>"$folder/log" | grep "^ZeRO" \
    || { tail -n 5 "$folder/log"; exit 1; }
