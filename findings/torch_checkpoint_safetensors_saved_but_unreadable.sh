#!/usr/bin/env bash
# torch 2.13.0 with safetensors 0.8.0: two ways to save a distributed checkpoint as safetensors end well and leave files
# that torch.distributed.checkpoint cannot load.
#
# Behaviour: (1) HuggingFaceStorageWriter given a state dict with a value that is no tensor, such as the number of the
# step, writes that value's bytes into the .safetensors file, before the header. What reads the file takes them for the
# header's length. (2) FileSystemWriter with serialization_format=SerializationFormat.SAFETENSORS writes good safetensors
# under the names of its usual files, even for tensors alone, and FileSystemReader hands them to torch.load. Neither the
# saving nor the writers' descriptions say so. The error of the loading is a CheckpointException, which is no Exception.
# Output seen: (1) without the step all is loaded again; with it, save returns and safe_open and load both fail with
# "header too large". The tensors are whole and stand behind the bytes of the step. (2) load fails within torch.load, with
# the advice to set weights_only=False, which has nothing to do with it; safetensors itself reads the file.
# Why it matters: a trainer's state dict nearly always holds a step, a learning rate or an epoch, and a checkpoint is
# mostly first read when a run has broken down and depends on it. `except Exception` around the loading, to fall back
# to an earlier checkpoint, does not see the error. Load once what is saved before the older one is deleted, and keep
# numbers as tensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cat > "$folder/checkpoint.py" <<'PY'
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat

root = Path(sys.argv[1])
WEIGHT, STEP = torch.arange(12.0).reshape(3, 4), {"step": 7}


def saved(name, writer, state):
    checkpoint.save(state, storage_writer=writer(root / name), no_dist=True)
    return next(path for path in (root / name).iterdir() if path.suffix in (".safetensors", ".distcp"))


def loads(reader, file):
    """Whether the weight is there again, or what the error says."""
    state = {"weight": torch.zeros(3, 4)}
    try:
        checkpoint.load(state, storage_reader=reader(file.parent), no_dist=True)
    except CheckpointException as error:
        assert not isinstance(error, Exception), "CheckpointException is an Exception now"
        return str(error)
    return torch.equal(state["weight"], WEIGHT)


hugging_face = lambda path: checkpoint.HuggingFaceStorageWriter(str(path))
files = lambda path: checkpoint.FileSystemWriter(path, serialization_format=SerializationFormat.SAFETENSORS)
plain = saved("plain", hugging_face, {"weight": WEIGHT.clone()})
assert loads(checkpoint.HuggingFaceStorageReader, plain) is True
usual = saved("usual", checkpoint.FileSystemWriter, {"weight": WEIGHT.clone(), **STEP})
assert loads(checkpoint.FileSystemReader, usual) is True

stepped = saved("stepped", hugging_face, {"weight": WEIGHT.clone(), **STEP})
found = loads(checkpoint.HuggingFaceStorageReader, stepped)
assert found is not True and "header too large" in found, "a value that is no tensor no longer hides the tensors"
try:
    safe_open(stepped, framework="pt")
except SafetensorError as error:
    print("(1) saved with a step, then:", error)
else:
    raise AssertionError("the file is good safetensors now")
raw = stepped.read_bytes()
header = raw.index(b'{"') - 8
assert torch.equal(load(raw[header:])["weight"], WEIGHT)
print(f"    {header} bytes stand before the header; the weight is whole behind them")

tensors = saved("tensors", files, {"weight": WEIGHT.clone()})
found = loads(checkpoint.FileSystemReader, tensors)
assert found is not True and "Weights only load failed" in found, "FileSystemReader reads safetensors now"
assert torch.equal(load(tensors.read_bytes())["weight"], WEIGHT)
print("(2) saved by FileSystemWriter as safetensors, then: Weights only load failed; safetensors itself reads it")
PY
"$folder/venv/bin/python" "$folder/checkpoint.py" "$folder/checkpoints" 2>"$folder/log" || { tail -n 5 "$folder/log"; exit 1; }
