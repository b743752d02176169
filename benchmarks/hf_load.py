"""How much memory does a rank take that loads and saves a Hugging Face checkpoint?

    python benchmarks/hf_load.py [--quick] [--json FILE] [--tp 4]

Writes a random checkpoint of the Llama family (1 billion parameters in bf16, untied),
loads it in fp32 with --tp processes, saves it again, and compares every rank's peak
with its shard. A process's peak is the kernel's VmHWM, which counts mapped pages of the
files too; libraries are what a rank has before it builds the backbone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import command_line, describe_machine, machine_line, peak_mib, write_figures
from safetensors.torch import save_file

from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import load_weights, save_weights
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.testing.distributed import Mesh, run_distributed

GIB = 1 << 30
SHARD_BYTES = 512 << 20
BILLION = dict(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=20,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
)
QUICK = BILLION | dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=4)


def main() -> None:
    parser = command_line(__doc__, "a model of 50 million parameters")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint (temporary)")
    arguments = parser.parse_args()
    machine = describe_machine()
    print(machine_line(machine), flush=True)
    folder = Path(tempfile.mkdtemp(prefix="hf-load-", dir=arguments.folder))
    try:
        parameters = write_random_checkpoint(folder / "in", QUICK if arguments.quick else BILLION)
        ranks = run_distributed(
            load_and_save, arguments.tp, arguments.tp, str(folder), timeout=3600
        )
    finally:
        shutil.rmtree(folder)
    print(f"{parameters / 1e9:.2f} billion parameters, tp {arguments.tp}")
    print("rank  libraries     shard  peak of load  above shard  peak of save  load s  save s")
    for rank, row in enumerate(ranks):
        print(
            f"{rank:4d}  {row['libraries'] / GIB:6.2f} GiB {row['shard'] / GIB:5.2f} GiB"
            f"  {row['load_peak'] / GIB:8.2f} GiB"
            f" {(row['load_peak'] - row['shard']) / GIB:8.2f} GiB"
            f"  {row['save_peak'] / GIB:8.2f} GiB  {row['load_s']:6.1f}  {row['save_s']:6.1f}"
        )
    figures = {"machine": machine, "parameters": parameters, "ranks": ranks}
    write_figures(arguments.json, figures)


def write_random_checkpoint(folder: Path, sizes: dict[str, int]) -> int:
    """Write a sharded bf16 checkpoint, layer by layer; returns the number of
    parameters.
    """
    folder.mkdir(parents=True)
    d, ffn, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    kv = d // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (ffn, d), "mlp.up_proj": (ffn, d),
        "mlp.down_proj": (d, ffn), "input_layernorm": (d,), "post_attention_layernorm": (d,),
    }  # fmt: skip
    groups = [
        {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        for number in range(sizes["num_hidden_layers"])
    ]
    groups.append({"model.embed_tokens.weight": (vocab, d)})
    groups.append({"lm_head.weight": (vocab, d), "model.norm.weight": (d,)})
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups):
        tensors = {key: (torch.randn(shape) * 0.02).bfloat16() for key, shape in group.items()}
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = dict(
        model_type="llama",
        rms_norm_eps=1e-5,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        **sizes,
    )
    (folder / "config.json").write_text(json.dumps(config))
    return sum(torch.Size(shape).numel() for group in groups for shape in group.values())


def load_and_save(mesh: Mesh, folder: str) -> dict[str, Any]:
    """One rank: bytes of the libraries, the shard and the peaks, and seconds."""
    initialize_parallel(mesh.tp, "cpu")
    try:
        libraries = int(2**20 * peak_mib())
        pretrained = read_config(f"{folder}/in")
        began = time.perf_counter()
        backbone = Backbone(
            pretrained.config, pretrained.vocab_size, pretrained.max_positions, initialize=False
        )
        load_weights(backbone, f"{folder}/in")
        loaded, load_peak = time.perf_counter(), int(2**20 * peak_mib())
        save_weights(backbone, f"{folder}/out", shard_bytes=SHARD_BYTES)
        return {
            "libraries": libraries,
            "shard": sum(p.nbytes for p in backbone.parameters()),
            "load_peak": load_peak,
            "save_peak": int(2**20 * peak_mib()),
            "load_s": loaded - began,
            "save_s": time.perf_counter() - loaded,
        }
    finally:
        destroy_parallel()


if __name__ == "__main__":
    main()
