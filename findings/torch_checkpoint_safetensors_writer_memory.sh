#!/usr/bin/env bash
# torch 2.13.0 with safetensors: torch.distributed.checkpoint's HuggingFaceStorageWriter needs twice the size of a file in
# host memory beside the state that it writes, also in async_save, whose staged copy is counted already.
#
# Behaviour: each file is made whole in memory before any of it is written, and twice: safetensors' save() turns every
# tensor into a bytes object, and then all of them into one. FileSystemWriter, torch's own format, writes tensor by tensor
# and needs nothing beside the state. Without fqn_to_index_mapping a rank's part is one file.
# Output seen: 512 MiB of float32 in eight tensors, one rank, async_save: the process grows by 2.00 times the state while
# HuggingFaceStorageWriter(save_distributed=True) writes, by 0.00 times with FileSystemWriter, and by 0.25 times where
# fqn_to_index_mapping puts every tensor into a file of its own. Two large steps of that are calls that hold the lock of
# the interpreter, so a loop of Python in the training's thread stands still in them; the longest pauses are printed.
# Why it matters: it is torch's format without a pickled file, so it is the one for checkpoints that others may have
# touched, and its documentation says nothing of memory. With ZeRO a rank's part is 12 bytes a parameter of its share: 12
# GB for 8 billion parameters on 8 GPUs. Staged and made twice more that is 288 GB on the node's host, where 96 were
# planned, and the process that is killed is a training that ran well until its first checkpoint. Give a mapping
# that keeps files small, or write the file with safetensors' save_file, which takes the tensors as they are.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cat > "$folder/memory.py" <<'PY'
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

MIB, TENSORS = 1 << 20, 8


def kilobytes(name):
    """A line of /proc/self/status: VmRSS is the memory now, VmHWM the most since the mark was cleared."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


def growth(state, writer):
    """The most that the process grows by while a thread writes, in sizes of the state, and its longest pause."""
    written = dcp.async_save(state, storage_writer=writer)
    with open("/proc/self/clear_refs", "w") as mark:
        mark.write("5")
    before, last, pause = kilobytes("VmRSS"), time.perf_counter(), 0.0
    while not written.done():
        time.sleep(0.001)
        now = time.perf_counter()
        pause, last = max(pause, now - last), now
    written.result()
    size = sum(tensor.nbytes for tensor in state.values())
    return (kilobytes("VmHWM") - before) * 1024 / size, pause


torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
state = {f"weight.{n}": torch.randn(64 * MIB // 4) for n in range(TENSORS)}
each_alone = {name: number for number, name in enumerate(state, start=1)}
for name, writer, expected in (
    ("FileSystemWriter", dcp.FileSystemWriter, 0.0),
    ("HuggingFaceStorageWriter", lambda path: dcp.HuggingFaceStorageWriter(path, save_distributed=True), 2.0),
    (
        "the same, a file for each tensor",
        lambda path: dcp.HuggingFaceStorageWriter(path, each_alone, save_distributed=True),
        2 / TENSORS,
    ),
):
    for attempt in range(2):
        with tempfile.TemporaryDirectory(dir=sys.argv[1]) as place:
            more, pause = growth(state, writer(place))
        if attempt == 0:
            # Staging for the first time leaves memory that the allocator has yet to return.
            continue
        print(f"{name}: + {more:.2f} times the state; longest pause of the training's thread {pause:.2f} s", flush=True)
        assert abs(more - expected) < 0.15, "this has changed"
PY
"$folder/venv/bin/python" -W ignore "$folder/memory.py" "$folder"
